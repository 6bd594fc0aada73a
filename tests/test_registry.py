"""Implementations by name: ours, a decorator's, and those of plug-ins."""

import pytest
from plug_ins import install

from ovexport.errors import OutOfMemory, PlugInError, RecipeError
from ovexport.registry import Registry


@pytest.fixture
def shapes() -> Registry[type]:
    registry: Registry[type] = Registry("ovexport.shapes", "shape")
    registry.register("own")(type("Own", (), {"__module__": "ovexport.shapes"}))
    return registry


def test_a_plug_in_is_imported_when_its_name_is_asked_for(shapes, tmp_path, monkeypatch) -> None:
    code = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nclass Round: pass\n"
    monkeypatch.syspath_prepend(
        install(tmp_path / "site", code, "[ovexport.shapes]\nround = round_shapes:Round\n", module="round_shapes")
    )
    assert shapes.names == ("own", "round")
    assert shapes.load("own", "shape").identity is None
    assert not (tmp_path / "site" / "imported").exists()
    loaded = shapes.load("round", "shape")
    assert (loaded.thing.__name__, loaded.provider) == ("Round", "stranger 0.1")
    assert (tmp_path / "site" / "imported").exists()
    assert [one.name for one in shapes.all()] == ["own", "round"]


def test_what_a_result_depends_on_changes_with_the_code_of_a_plug_in(shapes, tmp_path, monkeypatch) -> None:
    site = install(
        tmp_path / "site", "class Oval: pass\n", "[ovexport.shapes]\noval = oval_shapes:Oval\n", module="oval_shapes"
    )
    monkeypatch.syspath_prepend(site)
    before = shapes.load("oval", "shape").identity
    assert before is not None
    assert before.startswith("stranger 0.1 ")
    (site / "oval_shapes.py").write_text("class Oval: 'wider'\n")
    assert shapes.load("oval", "shape").identity != before


def test_an_unknown_name_is_one_line_with_the_known_ones(shapes) -> None:
    with pytest.raises(RecipeError) as caught:
        shapes.load("onw", "draw.shape")
    assert str(caught.value) == (
        "draw.shape='onw': no such shape; the known ones are own; a plug-in adds one with an entry point in the group "
        "ovexport.shapes"
    )


def test_two_plug_ins_of_one_name_are_both_named(shapes, tmp_path, monkeypatch) -> None:
    for name in ("first", "second"):
        site = install(
            tmp_path / name, "class A: pass\n", f"[ovexport.shapes]\nsame = {name}_code:A\n", name, f"{name}_code"
        )
        monkeypatch.syspath_prepend(site)
    with pytest.raises(RecipeError, match=r"a shape of this name is in (first|second) 0.1 and (first|second) 0.1"):
        shapes.load("same", "draw.shape")


def test_a_plug_in_that_cannot_be_imported_is_one_line_that_names_it(shapes, tmp_path, monkeypatch) -> None:
    site = install(
        tmp_path / "site",
        "import no_such_package_at_all\n",
        "[ovexport.shapes]\nbad = bad_shapes:A\n",
        module="bad_shapes",
    )
    monkeypatch.syspath_prepend(site)
    with pytest.raises(PlugInError, match=r"plug-in 'bad' of stranger 0.1: failed: ModuleNotFoundError: .*line 1\)"):
        shapes.load("bad", "draw.shape")


def test_an_error_of_a_plug_in_names_it_and_its_line_and_ours_pass(shapes) -> None:
    shapes.register("mine")(type("Mine", (), {"__module__": "notebook"}))
    mine, own = shapes.load("mine", "shape"), shapes.load("own", "shape")
    with (
        pytest.raises(
            PlugInError, match=r"plug-in 'mine' of module notebook: failed: KeyError: 'x' \(test_registry.py"
        ),
        mine.guarded(),
    ):
        raise KeyError("x")
    with pytest.raises(OutOfMemory), mine.guarded():
        raise MemoryError
    with pytest.raises(RecipeError), mine.guarded():
        raise RecipeError("said by ovexport")
    with pytest.raises(KeyError), own.guarded():
        raise KeyError("a defect of ours")


def test_a_name_is_registered_once(shapes) -> None:
    with pytest.raises(ValueError, match="shape 'own' is registered already"):
        shapes.register("own")(type("Other", (), {}))
