"""Implementations by name: ours, registered with a decorator, and those of plug-ins, found through entry points.

A plug-in is an installed distribution with an entry point in the group of a registry:

    [project.entry-points."ovexport.starting_points"]
    halves = "my_package.halves:Halves"

Its module is imported when a recipe asks for the name, never before. Code that is no distribution, such as a notebook,
uses the decorator: `@starting_points.register("halves")`.
"""

import importlib.metadata
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ovexport.errors import OvexportError, PlugInError, RecipeError
from ovexport.foreign import exhausted, said
from ovexport.storage.digests import file_digest

logger = logging.getLogger(__name__)

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(Generic[Thing]):
    """An implementation under its name.

    Attributes:
        thing: what was registered, usually a class or a function.
        provider: distribution and version of the plug-in that it comes from, or its module where it was registered
            with the decorator; None for one of ovexport's own.
    """

    name: str
    thing: Thing
    provider: str | None = None

    @property
    def identity(self) -> str | None:
        """What a result that was made with it depends on: the provider, and the SHA-256 of the file that defines it;
        None for one of ovexport's own."""
        if self.provider is None:
            return None
        file = _source_file(self.thing)
        return f"{self.provider} {file_digest(file)}" if file else self.provider

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Raise what a plug-in raises inside the block as one line that names it; errors of ovexport's own pass.

        Raises:
            PlugInError: with the plug-in's name, the error and the line of code that raised it.
            OutOfMemory: memory gave out in it.
        """
        try:
            yield
        except OvexportError:
            raise
        except Exception as error:
            if self.provider is None:
                raise
            raise exhausted(error, self.name) or self.failure(f"failed: {_told(error)}") from error

    def failure(self, problem: str) -> PlugInError:
        """What is wrong with the plug-in, in one line that names it."""
        return PlugInError(f"plug-in {self.name!r} of {self.provider}: {problem}; mend or update it")


class Registry(Generic[Thing]):
    """The implementations of one protocol, by name.

    Args:
        group: of the entry points that plug-ins have, such as "ovexport.starting_points".
        noun: what one of them is, for messages.
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group = group
        self.noun = noun
        self._registered: dict[str, Registered[Thing]] = {}

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """A decorator that registers a class or a function under a name.

        Raises:
            ValueError: the name is another one's already.
        """

        def add(thing: Thing) -> Thing:
            former = self._registered.get(name)
            if former is not None and _place(former.thing) != _place(thing):
                raise ValueError(f"{self.noun} {name!r} is registered already, by {_place(former.thing)}")
            module = str(getattr(thing, "__module__", "?"))
            provider = None if module.partition(".")[0] == "ovexport" else f"module {module}"
            self._registered[name] = Registered(name=name, thing=thing, provider=provider)
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Forget what was registered under a name, such as the former class of a notebook.

        Raises:
            KeyError: nothing was.
        """
        del self._registered[name]

    @property
    def names(self) -> tuple[str, ...]:
        """All known names, ours first; no plug-in is imported for it."""
        return tuple(dict.fromkeys((*self._registered, *sorted(self._entry_points()))))

    def load(self, name: str, option: str) -> Registered[Thing]:
        """The implementation of that name; ours goes before a plug-in's.

        Args:
            option: where the name was given, such as "compress.starting_point", for the message.

        Raises:
            RecipeError: the name is unknown, or two plug-ins have it.
            PlugInError: the plug-in can't be imported.
        """
        if name in self._registered:
            return self._registered[name]
        entries = self._entry_points().get(name, [])
        if not entries:
            raise RecipeError(
                f"{option}={name!r}: no such {self.noun}; the known ones are {', '.join(self.names) or 'none'}; "
                f"a plug-in adds one with an entry point in the group {self.group}"
            )
        if len(entries) > 1:
            providers = " and ".join(map(_provider, entries))
            raise RecipeError(f"{option}={name!r}: a {self.noun} of this name is in {providers}; uninstall one of them")
        return self._imported(entries[0])

    def identity(self, name: str | None) -> str | None:
        """What a result depends on that is made with the implementation of that name: `Registered.identity`; None
        without a name, and for one that can't be loaded, which a stage's check refuses."""
        try:
            return None if name is None else self.load(name, self.group).identity
        except OvexportError:
            return None

    def all(self) -> Iterator[Registered[Thing]]:
        """Every implementation, ours first; a plug-in is imported when it is its turn.

        Raises:
            RecipeError, PlugInError: as `load`.
        """
        return (self.load(name, self.group) for name in self.names)

    def _imported(self, entry: importlib.metadata.EntryPoint) -> Registered[Thing]:
        provider = _provider(entry)
        with Registered(name=entry.name, thing=entry, provider=provider).guarded():
            return Registered(name=entry.name, thing=entry.load(), provider=provider)

    def _entry_points(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for entry in importlib.metadata.entry_points(group=self.group):
            by_name.setdefault(entry.name, []).append(entry)
        return by_name


def _provider(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else f"module {entry.module}"


def _told(error: Exception) -> str:
    """What an error says, its type and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    words = said(error)
    name = type(error).__name__
    return f"{name}{place}" if words == name else f"{name}: {words}{place}"


def _place(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"


def _source_file(thing: object) -> Path | None:
    try:
        file = inspect.getsourcefile(thing)  # type: ignore[arg-type]
    except TypeError:  # an instance rather than a class or a function
        file = inspect.getsourcefile(type(thing))
    return Path(file) if file and Path(file).is_file() else None
