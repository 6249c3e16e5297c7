"""Tiny icon sets and emoji names, written as npm packages."""

import json
import tarfile
from pathlib import Path

from jaxdiff.datasets.icons.names import STYLES
from jaxdiff.datasets.icons.packages import NAMES, VERSIONS, package_of

THINGS = {
    "cat": ("animal-mammal", "1F408", "#d33"),
    "dog": ("animal-mammal", "1F415", "#3a3"),
    "fox": ("animal-mammal", "1F98A", "#e80"),
    "owl": ("animal-bird", "1F989", "#853"),
    "rocket": ("transport-air", "1F680", "#36c"),
    "rose": ("plant-flower", "1F339", "#e39"),
    "strawberry": ("food-fruit", "1F353", "#a0f"),
    "grapes": ("food-fruit", "1F347", "#0cc"),
}
SHAPES = (
    '<rect x="2" y="2" width="{a}" height="12" fill="{c}"/>',
    '<circle cx="8" cy="8" r="{b}" fill="{c}"/>',
    '<path d="M8 1L15 15H1z" fill="{c}"/><rect width="{d}" height="2" y="9" fill="#000"/>',
    '<path d="M1 5h14v6H1z" fill="{c}"/><circle cx="8" cy="8" r="{d}" fill="#fff"/>',
)


def body(index: int, style: int, colour: str) -> str:
    """A shape for the style, in the thing's colour and of its proportions."""
    sizes = {"a": 5 + index, "b": 4 + index * 0.4, "d": 1 + index * 0.6}
    return SHAPES[style].format(c=colour, **sizes)


def write_package(folder: Path, package: str, files: dict) -> None:
    place = folder / package
    for name, data in ({"package.json": {"name": package}} | files).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(data))


def write_names(folder: Path) -> None:
    subgroups = ["person-role", "animal-mammal", "animal-bird", "transport-air", "plant-flower"]
    subgroups += ["food-fruit", "country-flag"]
    people = {
        "label": "woman judge",
        "hexcode": "1F469-200D-2696-FE0F",
        "group": 1,
        "subgroup": 0,
        "skins": [
            {"label": "woman judge: dark skin tone", "hexcode": "1F469-1F3FF-200D-2696-FE0F"}
        ],
    }
    flag = {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5", "group": 9, "subgroup": 6}
    entries = [people, flag, {"label": "regional indicator A", "hexcode": "1F1E6"}]
    for name, (subgroup, code, _) in THINGS.items():
        tags = {"cat": ["pet", "kitten"], "dog": ["pet"]}.get(name, [])
        subgroup = subgroups.index(subgroup)
        entry = {"label": name, "hexcode": code, "group": 3, "subgroup": subgroup, "tags": tags}
        entries.append(entry)
    codes = {"1F408": "cat", "1F680": ["rocket", "space_ship"], "1F98A": ["fox", "fox_face"]}
    write_package(
        folder,
        NAMES,
        {
            "en/data.json": entries,
            "en/shortcodes/emojibase.json": codes,
            "meta/groups.json": {"subgroups": {str(i): name for i, name in enumerate(subgroups)}},
        },
    )


def write_sets(folder: Path) -> Path:
    """Write the four icon sets, each with all things, and the names; fluent-emoji has no chars."""
    for style, icon_set in enumerate(STYLES):
        icons = {
            name: {"body": body(index, style, colour)}
            for index, (name, (_, _, colour)) in enumerate(THINGS.items())
        }
        icons |= {"woman-judge-dark": {"body": '<path d="M0 0h9v9z"/>'}}
        chars = {code.lower(): name for name, (_, code, _) in THINGS.items()}
        files = {
            "icons.json": {"prefix": icon_set, "icons": icons, "width": 16, "height": 16},
            "info.json": {"category": "Emoji"} if icon_set == "noto" else {},
            "chars.json": {} if icon_set == "fluent-emoji" else chars,
        }
        write_package(folder, package_of(icon_set), files)
    write_names(folder)
    return folder


def pack(folder: Path, package: str, out: Path) -> Path:
    """Archive a package as `npm pack` does."""
    stem = package.lstrip("@").replace("/", "-")
    path = out / f"{stem}-{VERSIONS.get(package, '1.0.0')}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / package, "package")
    return path
