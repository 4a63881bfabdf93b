"""`notbugs doctor` finds what is wrong with a machine, and nothing where nothing is."""

import json
import socket
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main


def examined(*args):
    done = CliRunner().invoke(main, ["doctor", "--json", *map(str, args)])
    found = json.loads(done.stdout)
    assert found["ready"] == (done.exit_code == 0)
    return {finding["what"]: finding for finding in found["findings"]}


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_machine_that_runs_these_tests_is_ready(tmp_path, listening):
    found = examined("--store", tmp_path / "store", "--address", f"127.0.0.1:{listening}")
    assert {name for name, finding in found.items() if finding["state"] == "broken"} == set()
    assert set(found) >= {"python", "packages", "device", "ray", "store", "disk", "shared memory", "ports"}
    assert f"torch {metadata.version('torch')}" in found["packages"]["found"]
    done = CliRunner().invoke(main, ["doctor", "--store", str(tmp_path / "store")])
    assert done.exit_code == 0 and len(done.output.splitlines()) == len(found)


def test_a_store_that_cannot_be_written_and_a_cluster_that_is_away_are_to_be_mended(tmp_path, listening):
    (tmp_path / "file").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = examined("--store", tmp_path / "file" / "store", "--address", f"127.0.0.1:{free.getsockname()[1]}")
    assert found["store"]["state"] == found["ray"]["state"] == "broken"
    assert "Cannot create directory" in found["store"]["found"]
    assert found["ray"]["remedy"] == "start the cluster, or open the tunnel to it"


def test_missing_and_old_packages_little_room_and_taken_ports_are_found(tmp_path, listening, monkeypatch):
    from pipeline.begin import doctor

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "ray" else version(name))
    monkeypatch.setattr(metadata, "requires", lambda name: ["ray>=2.60", "surely-absent>=1", 'x; extra == "dev"'])
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    monkeypatch.setattr(doctor, "PORTS", {listening: "Ray's head"})
    found = examined("--store", tmp_path)
    assert found["packages"]["found"] == "ray 0.1, expected >=2.60; surely-absent is missing"
    assert found["packages"]["state"] == "broken"
    assert found["disk"]["state"] == found["ports"]["state"] == "attention"
    assert str(Path(tmp_path)) in found["disk"]["found"] and f"{listening} (Ray's head)" in found["ports"]["found"]
