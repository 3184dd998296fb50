"""What a checkout of TensorRT-LLM, or an installed one, calls its fields and keywords: read from its text, nothing run.

Works for every version whose files are where they have been since 1.0 (docs/first_gpu_run.md names them).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

FILES = {
    "TorchLlmArgs": "llmapi/llm_args.py",
    "DecodingBaseConfig": "llmapi/llm_args.py",
    "SamplingParams": "sampling_params.py",
    "GuidedDecodingParams": "sampling_params.py",
    "DisaggregatedParams": "disaggregated_params.py",
    "SchedulingParams": "scheduling_params.py",
    "CompletionOutput": "executor/result.py",
    "GenerationResult": "executor/result.py",
    "RequestError": "executor/utils.py",
    "KVCacheEventSerializer": "_utils.py",
}
"""Where the classes are that we rely on, below tensorrt_llm/."""

LLM_FILE = "llmapi/llm.py"


class NotFoundInSource(LookupError):
    """A class or function that we rely on is not where it is expected."""


def find_package(checkout: Path | None) -> Path | None:
    """The folder tensorrt_llm/ of a checkout or, without one, of what is installed; None where there is none."""
    if checkout is not None:
        return next((path for path in (checkout / "tensorrt_llm", checkout) if (path / "llmapi").is_dir()), None)
    spec = find_spec("tensorrt_llm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a class, by all the names that a caller may use."""

    names: tuple[str, ...]
    type_names: frozenset[str]  # every name in the annotation; text in it (of literals) is not


@dataclass
class Source:
    """One version's text. `package` is its folder tensorrt_llm/."""

    package: Path
    _trees: dict[Path, ast.Module] = field(default_factory=dict)

    @cached_property
    def version(self) -> str:
        """As version.py or __init__.py says it; "unknown" otherwise."""
        for name in ("version.py", "__init__.py"):
            path = self.package / name
            for node in ast.walk(self._tree(path)) if path.exists() else ():
                if isinstance(node, ast.Assign) and _targets(node) == ["__version__"]:
                    if isinstance(node.value, ast.Constant):
                        return str(node.value.value)
        return "unknown"

    def fields(self, class_name: str, file: str | None = None) -> dict[str, Field]:
        """A class's fields, its bases' before its own, by name; aliases are entries of their own. Raises
        NotFoundInSource."""
        found: dict[str, Field] = {}
        path = self.package / (file or FILES[class_name])
        for _, node in self._lineage(path, class_name):
            for each in (each for statement in node.body for each in _fields_of(statement)):
                found.update(dict.fromkeys(each.names, each))
        return found

    def attributes(self, class_name: str) -> frozenset[str]:
        """Fields, methods, properties and what `__init__` sets on self, of a class and its bases."""
        names = set(self.fields(class_name))
        for _, node in self._lineage(self.package / FILES[class_name], class_name):
            names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
            names |= {
                item.attr
                for item in ast.walk(node)
                if isinstance(item, ast.Attribute)
                and isinstance(item.ctx, ast.Store)
                and isinstance(item.value, ast.Name)
                and item.value.id == "self"
            }
        return frozenset(names)

    def texts(self, class_name: str) -> frozenset[str]:
        """All string constants in a class: the keys and types that a serializer writes."""
        _, node = self._class(self.package / FILES[class_name], class_name)
        constants = (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
        return frozenset(value for value in constants if isinstance(value, str))

    def has_class(self, class_name: str) -> bool:
        """Whether the file that should hold the class does."""
        try:
            self._class(self.package / FILES[class_name], class_name)
        except NotFoundInSource:
            return False
        return True

    def keywords(self, method: str) -> frozenset[str]:
        """The parameters of a method of the LLM class, without self."""
        for node in ast.walk(self._tree(self.package / LLM_FILE)):
            if isinstance(node, ast.FunctionDef) and node.name == method:
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                return frozenset(argument.arg for argument in arguments) - {"self"}
        raise NotFoundInSource(f"no method {method} in {LLM_FILE}")

    def functions(self, file: str) -> frozenset[str]:
        """The names of all functions and methods in a file."""
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        return frozenset(node.name for node in ast.walk(self._tree(self.package / file)) if isinstance(node, functions))

    def file_of(self, class_name: str, near: str) -> str | None:
        """The file, below the package, that defines a class which `near` defines or imports."""
        try:
            path, _ = self._class(self.package / near, class_name)
        except NotFoundInSource:
            return None
        return str(path.relative_to(self.package))

    def subclasses(self, base: str) -> Iterator[str]:
        """The names of a class and of all classes below it, in its own file."""
        file = self.file_of(base, FILES[base]) or FILES[base]
        yield base
        for node in self._tree(self.package / file).body:
            if isinstance(node, ast.ClassDef) and node.name != base:
                if base in {item.name for _, item in self._lineage(self.package / file, node.name)}:
                    yield node.name

    def constant(self, class_name: str, file: str, name: str) -> str | None:
        """A text that a class's body assigns: `name = "..."`, or its annotation's first literal."""
        _, node = self._class(self.package / file, class_name)
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and _targets(statement) == [name]:
                for item in ast.walk(statement):
                    if isinstance(item, ast.Constant) and isinstance(item.value, str):
                        return item.value
        return None

    def _tree(self, path: Path) -> ast.Module:
        if path not in self._trees:
            if not path.exists():
                raise NotFoundInSource(f"no file {path.relative_to(self.package)}")
            self._trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        return self._trees[path]

    def _lineage(self, path: Path, class_name: str) -> list[tuple[Path, ast.ClassDef]]:
        """The classes of this package that a class inherits from, then itself."""
        path, node = self._class(path, class_name)
        lineage: list[tuple[Path, ast.ClassDef]] = []
        for base in node.bases:
            name = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
            try:
                lineage += self._lineage(path, name)
            except NotFoundInSource:
                continue  # of another package
        return [*lineage, (path, node)]

    def _class(self, path: Path, class_name: str) -> tuple[Path, ast.ClassDef]:
        tree = self._tree(path)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                return path, node
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for imported in imports:
            if class_name in {alias.asname or alias.name for alias in imported.names}:
                target = self._module_file(path, imported)
                if target is not None and target != path:
                    return self._class(target, class_name)
        raise NotFoundInSource(f"no class {class_name} in {path.relative_to(self.package)}")

    def _module_file(self, path: Path, node: ast.ImportFrom) -> Path | None:
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = path.parents[node.level - 1]
        elif parts[:1] == ["tensorrt_llm"]:
            folder, parts = self.package, parts[1:]
        else:
            return None
        target = folder.joinpath(*parts)
        return next((file for file in (target.with_suffix(".py"), target / "__init__.py") if file.exists()), None)


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _fields_of(statement: ast.stmt) -> Iterator[Field]:
    """The public field that a statement of a class's body declares."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return
    types = _names_in(statement.annotation)
    name = statement.target.id
    if "ClassVar" in types or name.startswith("_"):
        return
    aliases, init = [], True
    if isinstance(statement.value, ast.Call):
        called = _names_in(statement.value.func)
        for keyword in statement.value.keywords:
            if keyword.arg in ("alias", "validation_alias"):
                aliases += [item.value for item in ast.walk(keyword.value) if isinstance(item, ast.Constant)]
            # Of dataclasses' `field`; pydantic's `Field` takes the word too, and such a field all the same.
            if keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and "field" in called:
                init = bool(keyword.value.value)
    if init:
        yield Field((name, *(str(alias) for alias in aliases)), types)


def _names_in(annotation: ast.expr) -> frozenset[str]:
    """Every name in an annotation, also in a quoted one."""
    names = {item.id for item in ast.walk(annotation) if isinstance(item, ast.Name)}
    names |= {item.attr for item in ast.walk(annotation) if isinstance(item, ast.Attribute)}
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _names_in(ast.parse(annotation.value, mode="eval").body)
    return frozenset(names)
