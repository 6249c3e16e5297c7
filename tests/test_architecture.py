"""Layers, names and signatures of the package, read from its source."""

import ast
import collections
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdiff"
MAX_PARAMETERS = 13

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, ast.Module]:
    """The syntax tree of each module of the package, by its dotted name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


SOURCES = sources()


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """All that a module imports from the package, also inside functions and for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxdiff."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "jaxdiff":
                yield from (f"jaxdiff.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("jaxdiff."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def levels() -> dict[str, int]:
    """The level of each package in import-linter's contract; 0 is the highest."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [contract] = settings["contracts"]
    assert "ignore_imports" not in contract
    return {
        name.strip(" ()"): level
        for level, layer in enumerate(contract["layers"])
        for name in layer.split("|")
    }


def public_definitions() -> Iterator[tuple[str, str, ast.ClassDef | Function]]:
    """(module, name, node) of each public class and function at the top of a module."""
    for module, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                yield module, node.name, node


def test_every_package_has_a_layer():
    packages = {name.split(".")[1] for name in SOURCES if "." in name} - {"__main__"}
    assert packages <= set(levels())


def test_modules_import_from_their_own_package_and_lower_layers_only():
    level = levels()
    upward = []
    for module, tree in SOURCES.items():
        own = module.split(".")[1] if "." in module else "__main__"
        for target in imports(module, tree):
            other = target.split(".")[1]
            if own != other and other in level and level.get(own, -1) >= level[other]:
                upward.append(f"{module} -> {target}")
    assert not upward, "\n".join(sorted(upward))


def test_no_two_public_classes_or_functions_share_a_name():
    modules = collections.defaultdict(list)
    for module, name, _ in public_definitions():
        modules[name].append(module)
    shared = [f"{name}: {', '.join(found)}" for name, found in modules.items() if len(found) > 1]
    assert not shared, "\n".join(sorted(shared))


def test_public_functions_have_few_parameters():
    crowded = []
    for module, name, node in public_definitions():
        found = [(name, node)] if isinstance(node, Function) else []
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, Function)]
            public = [m for m in methods if not m.name.startswith("_") or m.name.endswith("__")]
            found = [(f"{name}.{method.name}", method) for method in public]
        for label, function in found:
            a = function.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            names = names[1:] if names[:1] in (["self"], ["cls"]) else names
            count = len(names) + (a.vararg is not None) + (a.kwarg is not None)
            if count > MAX_PARAMETERS:
                crowded.append(f"{module}.{label}: {count}")
    assert not crowded, "\n".join(crowded)


def test_the_root_package_holds_three_modules():
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
    }
