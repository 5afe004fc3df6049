"""What is in the wheels, as CycloneDX (`make wheel` writes them beside the wheels).

The package's names what it needs to run, in the versions of this environment, which are the locked ones; the
runtime's names the llama.cpp it was built from, each patch and each file of others in it, with SHA-256.
"""

import os
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.runtime.upstream import sha256_of

CODE = {".c", ".cpp", ".h", ".hpp"}


def of_package() -> Bom:
    """Return what mone-export needs, and what that needs, and so on."""
    found: dict[str, Component] = {}
    needs: dict[str, set[str]] = {}
    waiting = [("mone-export", frozenset[str]())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        there = distribution(name)
        found[name] = found.get(name) or of_distribution(name, there)
        wanted = required(there, extras)
        needs.setdefault(name, set()).update(each for each, _ in wanted)
        waiting += [each for each in wanted if each not in seen]
        seen.update(wanted)
    bom = described(found.pop("mone-export"), found.values())
    every = found | {"mone-export": bom.metadata.component}
    for name, others in needs.items():
        bom.register_dependency(every[name], [every[other] for other in sorted(others)])
    return bom


def required(there: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """Return what a distribution with extras needs on this system: names, and their extras."""
    wanted = map(Requirement, there.requires or ())
    return [
        (canonicalize_name(each.name), frozenset(each.extras))
        for each in wanted
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def of_distribution(name: str, there: Distribution) -> Component:
    """Describe an installed distribution; a local label of its version is left out."""
    version = there.version.partition("+")[0]
    licence = there.metadata.get("License-Expression") or there.metadata.get("License") or ""
    stated = [LicenseFactory().make_from_string(licence)] if licence and "\n" not in licence else []
    purl = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, bom_ref=name, purl=purl, licenses=stated)


def of_runtime(state: runtime.Source, version: str) -> Bom:
    """Return what the wheel of the patched llama.cpp was built from."""
    upstream = state.upstream
    sdist = Component(
        name=upstream.package,
        version=upstream.version,
        bom_ref=upstream.package,
        purl=PackageURL("pypi", name=upstream.package, version=upstream.version),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=upstream.sha256)],
    )
    commit = upstream.llama_cpp_commit
    purl = PackageURL("github", "ggml-org", "llama.cpp", commit)
    parts = [sdist, Component(name="llama.cpp", version=commit, bom_ref="llama.cpp", purl=purl)]
    parts += [of_file(patch, f"patches/{patch.name}") for patch in state.patches]
    vendored = sorted(file for file in (state.tree / "vendor").rglob("*") if file.suffix in CODE)
    parts += [of_file(file, file.relative_to(state.tree).as_posix()) for file in vendored]
    whole = Component(name="mone_llama", version=version, bom_ref="mone_llama")
    bom = described(whole, parts)
    bom.register_dependency(whole, parts)
    return bom


def of_file(file: Path, name: str) -> Component:
    """Describe a file by its SHA-256."""
    return Component(
        name=name,
        type=ComponentType.FILE,
        bom_ref=name,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256_of(file))],
    )


def described(whole: Component, parts: Iterable[Component]) -> Bom:
    """Return a bill of materials that is the same for the same materials and SOURCE_DATE_EPOCH."""
    bom = Bom(components=parts)
    bom.metadata.component = whole
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    content = " ".join(f"{each.name} {each.version} {[*each.hashes]}" for each in [whole, *bom.components])
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, content)
    return bom


def write(bom: Bom, file: Path) -> None:
    """Write a bill of materials as JSON; a MoneError where CycloneDX's schema does not take it."""
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise MoneError(f"{file.name} is no valid CycloneDX: {str(error)[:500]}")
    file.write_text(text + "\n", encoding="utf-8")
