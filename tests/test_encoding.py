"""What a mode means, as it is packed and as it is proven."""

import ast
from pathlib import Path
from typing import get_args

import numpy as np
import openvino as ov
import pytest

import ovexport
from ovexport.openvino.graph import unpacked
from ovexport.verify.modes import STORAGE, predicted_bytes
from ovexport.weights.encoding import ENCODINGS, Encoding, Mode, encoding_of
from ovexport.weights.layer import LayerFormat

encodings = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=list(ENCODINGS))


def test_every_mode_but_float_has_an_encoding() -> None:
    assert set(ENCODINGS) == set(get_args(Mode)) - {"float"}


def test_the_proof_has_the_same_modes_in_a_table_of_its_own() -> None:
    assert set(STORAGE) == set(ENCODINGS)
    for mode, encoding in ENCODINGS.items():
        assert (
            encoding.element_type, encoding.bits, encoding.lowest, encoding.highest, encoding.symmetric,
        ) == (
            STORAGE[mode].element_type, STORAGE[mode].bits, STORAGE[mode].lowest, STORAGE[mode].highest,
            STORAGE[mode].symmetric,
        )  # fmt: skip


@encodings
def test_the_proof_predicts_the_bytes_of_a_layer_alike(encoding: Encoding) -> None:
    for rows, columns, group in ((3, 5, 5), (7, 96, 32), (1, 3, 1)):
        layer = LayerFormat(
            name="w", kind="linear", mode=encoding.mode, out_features=rows, in_features=columns, group_size=group
        )
        assert predicted_bytes(layer) == layer.weight_bytes > 0


@encodings
def test_packed_codes_are_read_back_by_openvino_and_take_the_bytes_predicted(encoding: Encoding) -> None:
    codes = np.linspace(encoding.lowest, encoding.highest, 21).astype(encoding.code_dtype).reshape(3, 7)
    packed = encoding.pack(codes)
    assert len(packed) == encoding.packed_bytes(codes.size)
    element_type = getattr(ov.Type, encoding.element_type)
    constant = ov.op.Constant(ov.Tensor(packed, ov.Shape(codes.shape), element_type), shared_memory=True)
    assert np.array_equal(unpacked(constant), codes)
    assert codes.min() == encoding.lowest
    assert codes.max() == encoding.highest


@pytest.mark.parametrize("mode", ENCODINGS)
def test_an_encoding_is_found_by_its_bits_and_zero_points(mode: Mode) -> None:
    assert encoding_of(bits=ENCODINGS[mode].bits, zero_points=ENCODINGS[mode].zero_points) is ENCODINGS[mode]


def test_no_encoding_has_three_bits() -> None:
    with pytest.raises(KeyError, match="3 bits"):
        encoding_of(bits=3, zero_points="none")


def test_a_layer_in_floating_point_has_no_encoding() -> None:
    layer = LayerFormat(name="w", kind="linear", mode="float", out_features=2, in_features=2, group_size=2)
    assert layer.encoding is None
    assert layer.weight_bytes == 0
    with pytest.raises(ValueError, match="w: has no codes"):
        layer.require_encoding()


def test_names_of_modes_stand_where_they_are_defined_or_chosen_and_nowhere_else() -> None:
    homes = {"weights/encoding.py", "verify/modes.py", "recipe/compress.py", "weights/policy.py"}
    package = Path(ovexport.__file__).parent
    for path in sorted(package.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = {node.value for node in nodes if isinstance(node, ast.Constant) and node.value in ENCODINGS}
        place = path.relative_to(package).as_posix()
        assert not named or place in homes, f"{place} knows {', '.join(named)}: what follows from a mode is Encoding's"
