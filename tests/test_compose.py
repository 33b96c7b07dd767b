"""The Compose file: of the official schema, nobody root, no secrets; the image has what it mounts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

TOP = Path(__file__).parent.parent
FILE = yaml.safe_load((TOP / "docker-compose.yml").read_text())
SERVICES: Mapping[str, Mapping[str, Any]] = FILE["services"]
OURS = [name for name, each in SERVICES.items() if "build" in each]


def test_the_schema() -> None:
    schema = json.loads((TOP / "tests" / "schemas" / "compose-spec.json").read_text())
    assert [each.message for each in Draft7Validator(schema).iter_errors(FILE)] == []
    wrong = {**FILE, "services": {"coordinator": {"imagee": "x"}}}
    assert list(Draft7Validator(schema).iter_errors(wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_no_root_holds_no_secret_and_keeps_its_data_in_named_volumes(name: str) -> None:
    service = SERVICES[name]
    assert str(service["user"]) not in ("", "0", "root")
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|DATABASE", variable):
            assert re.search(r"\$\{[A-Z]+_PASSWORD:\?", value), variable
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert (TOP / source).exists() if source.startswith("./") else source in FILE["volumes"], volume
    assert "healthcheck" in service or name in ("found", "simulate")
    for other, needed in service.get("depends_on", {}).items():
        assert needed["condition"] == "service_completed_successfully" or "healthcheck" in SERVICES[other]


def test_the_image_has_what_the_file_mounts_and_runs_as_nobody() -> None:
    lines = (TOP / "deploy" / "Dockerfile").read_text().splitlines()
    assert sum(each.startswith("FROM ") for each in lines) == 2
    assert [each for each in lines if each.startswith("USER ")] == ["USER 10001"]
    pinned = re.search(r'"(torch==[^"]+)"', (TOP / "pyproject.toml").read_text())
    assert pinned is not None
    assert any(each.startswith("RUN ") and each.endswith(pinned[1]) for each in lines)
    text = "\n".join(lines)
    assert not re.search(r"https?://", text)
    made = {word for word in re.findall(r"[\w/-]+", text) if not word.startswith("/")}
    for name in OURS:
        for volume in SERVICES[name].get("volumes", ()):
            target = volume.split(":")[1]
            if target.startswith("/var/lib/hansa/"):  # a new volume takes its owner from the image
                assert target.removeprefix("/var/lib/hansa/") in made
