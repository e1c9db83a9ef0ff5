"""All that is public is described: fields, methods and attributes, inherited ones too, arguments and errors."""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import re
import textwrap

import pytest

import gla_jax
from gla_jax import interop, nn, pallas, train

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "api.md"
PUBLIC = (gla_jax, nn, train, interop, pallas)
# `f`, in a docstring that says that arguments or errors are f's.
REFERENCE = re.compile(r"\b(?:as(?: in| for)?|those of)\s+`([\w.]+)`")


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_all_that_is_public_is_documented(package):
    assert undocumented(package) == []


def test_what_is_not_documented_is_found():
    class Base:
        inherited: int = 0

        def method(self, given, other):
            """Uses given."""
            raise KeyError

        def silent(self):
            pass

    class Public(Base):
        """A class."""

        def method(self, given, other):
            """As `Public.silent`; others are given."""

    def function(x, y):
        """Of x."""
        raise ValueError

    Base.__module__ = Public.__module__ = "gla_jax.silent"
    module = type(pathlib)("gla_jax")
    module.__all__, module.Public, module.Base, module.function = ["Public", "Base", "function"], Public, Base, function
    assert sorted(undocumented(module)) == [
        *("gla_jax.Base", "gla_jax.Base.inherited", "gla_jax.Base.method: KeyError", "gla_jax.Base.method: other"),
        *("gla_jax.Base.silent", "gla_jax.Public.inherited", "gla_jax.Public.method: other", "gla_jax.Public.silent"),
        *("gla_jax.function: ValueError", "gla_jax.function: y"),
    ]


def undocumented(package):
    """Names of public things without a docstring, and of arguments, fields and errors that no docstring names."""
    missing = []
    for name in package.__all__:
        thing = getattr(package, name)
        full = f"{package.__name__}.{name}"
        if inspect.isfunction(thing):
            missing += function_gaps(full, thing, inspect.getdoc(thing) or "", package)
        elif inspect.isclass(thing):
            if not vars(thing).get("__doc__"):
                missing.append(full)
            missing += class_gaps(full, thing, package)
        elif name not in PAGE.read_text():
            missing.append(full)
    return missing


def on_the_page():
    """The names that the built page must have: all that is public, and what its classes inherit from ours."""
    names = {"gla_jax.nn.sharding.DEFAULT_RULES", "gla_jax.nn.config.MIXERS"}
    for package in PUBLIC:
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                names.add(f"{package.__name__}.{name}")
            told = set(re.findall(r"\w+", inspect.getdoc(thing) or ""))  # a field may be described there alone
            for base in ours(thing) if inspect.isclass(thing) else ():
                members = {n for n in inspect.get_annotations(base) if n not in told}
                members |= {n for n, member in vars(base).items() if documents(member)}
                names |= {f"{package.__name__}.{name}.{n}" for n in members if not n.startswith("_")}
    return names


def ours(thing):
    """The class and its bases in gla_jax."""
    return [base for base in thing.__mro__ if base.__module__.startswith("gla_jax")]


def class_gaps(full, thing, package):
    missing, seen = [], set()
    for base in ours(thing):
        for n in inspect.get_annotations(base):
            if not n.startswith("_") and n not in seen and not any(n in described(b) for b in ours(thing)):
                missing.append(f"{full}.{n}")
            seen.add(n)
        generated = dataclasses.is_dataclass(base) or issubclass(base, tuple)
        for n, member in vars(base).items():
            hidden = n.startswith("_") and n not in ("__init__", "__call__")
            if n in seen or hidden or not documents(member) or (n == "__init__" and generated):
                continue
            seen.add(n)
            doc = inspect.getdoc(getattr(thing, n)) or ""
            if n in ("__init__", "__call__"):  # a class says what it is built of
                doc = (inspect.getdoc(thing) or "") + ("" if n == "__init__" else doc)
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function):
                missing += function_gaps(f"{full}.{n}", function, doc, package)
            elif not doc:
                missing.append(f"{full}.{n}")
    return missing


def function_gaps(full, function, doc, package):
    """The function itself without a docstring, else its arguments and errors that the docstring does not name."""
    if not doc:
        return [full]
    doc += "".join(inspect.getdoc(x) or "" for x in map(resolved(package, full), REFERENCE.findall(doc)) if x)
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = (node.exc for node in ast.walk(body) if isinstance(node, ast.Raise) and node.exc)
    names = {getattr(e, "id", getattr(e, "attr", "")) for e in (getattr(x, "func", x) for x in raised)}
    names |= set(inspect.signature(function).parameters) - {"self", "cls"}
    # `raise error` hands on what was caught, under its own name; a base class' NotImplementedError is for who writes a
    # subclass, whom the method's own docstring tells what to write.
    names -= {"error", "NotImplementedError"}
    return [f"{full}: {n}" for n in sorted(names) if not n.startswith("_") and not re.search(rf"\b{n}\b", doc)]


def resolved(package, full):
    """What a docstring of the thing with this name means by a name."""

    def find(name):
        for start in (*PUBLIC, package, *(getattr(package, full.split(".")[-2], None),)):
            thing = start
            for part in name.removeprefix("gla_jax.nn.").split("."):
                thing = getattr(thing, part, None)
            if thing is not None:
                return thing
        return None

    return find


def documents(member):
    return inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))


def described(thing):
    """Fields with a string of their own below them, or with their name in the class's docstring."""
    words = set(re.findall(r"\w+", vars(thing).get("__doc__") or ""))
    if thing.__qualname__ != thing.__name__:
        return words
    module = ast.parse(pathlib.Path(inspect.getsourcefile(thing)).read_text())
    body = next(n for n in ast.walk(module) if isinstance(n, ast.ClassDef) and n.name == thing.__name__).body
    return words | {
        first.target.id
        for first, second in itertools.pairwise(body)
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
    }
