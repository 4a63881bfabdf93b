"""Checks before a run starts."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from click.testing import CliRunner

from pipeline import terminal
from pipeline.cli import main
from pipeline.experiment import graph
from pipeline.run import runs
from stages import load
from stages.nets import small_cnn

OWN = """
from stages.nets import small_cnn
print("imported")

def net(classes, channels):
    return small_cnn(classes, channels)
"""


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[tuple[str, Counter[str]]]:
    """The address of a web server, and the number of requests per path; ``/w.pt`` holds weights."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder, asked = tmp_path / "served", Counter[str]()
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(small_cnn(10, 1).state_dict(), folder / "w.pt")

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("arch", ["small_cnn", pytest.param("./own.py:net", marks=pytest.mark.slow)])
def test_a_run_lists_a_source_once_fetches_weights_once_and_builds_its_graph_once(
    arch, served, write, tmp_path, monkeypatch
):
    url, asked = served
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    calls = Counter[str]()

    def counting(name, function):
        def counted(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return counted

    monkeypatch.setattr(load, "list_source", counting("listed", load.list_source))
    for module in (graph, runs):
        monkeypatch.setattr(module, "build", counting("built", module.build))
    weights = {"arch": arch, "weights": f"{url}/w.pt", "shape": [1, 8, 8], "classes": 10}
    file = write(
        {
            "name": "handed",
            "datasets": {"clean": {"load": {"source": "sklearn-digits", "limit": 64, "shard_size": 64}}},
            "models": {"net": {"pretrained": weights}},
            "evaluations": {"accuracy": {"models": ["net"], "on": "clean"}},
        }
    )
    planned = CliRunner().invoke(main, ["plan", str(file), "--store", "s"])
    assert planned.exit_code == 0 and not asked, "a plan downloads nothing"
    calls.clear()
    for there in (False, True):
        made = CliRunner().invoke(main, ["run", str(file), "--store", "s", "--engine", "inline"])
        assert made.exit_code == 0, made.output
        assert asked == {"/w.pt": 1}, "what is there is not fetched again"
        assert calls == ({"built": 2, "listed": 1} if there else {"built": 1, "listed": 1})


@pytest.mark.parametrize(("classes", "refused"), [(100, False), (101, True)])
def test_confusions_of_too_many_classes_are_refused_before_the_work(classes, refused, write, tmp_path):
    images = {"source": "synthetic", "images": {"train": 256, "test": 256}, "classes": classes, "size": 8}
    file = write(
        {
            "name": "many",
            "datasets": {"clean": {"load": images}},
            "models": {"standard": {"train": {"on": "clean", "arch": "small_cnn", "epochs": 1}}},
            "evaluations": {"accuracy": {"models": ["standard"], "on": "clean", "confusion": True}},
        }
    )
    result = CliRunner().invoke(main, ["plan", str(file), "--store", str(tmp_path / "s")])
    assert result.exit_code == (2 if refused else 0)
    assert ("at most 100 classes, the dataset has 101" in result.output) == refused


def test_few_steps_an_epoch_and_a_slow_source_are_remarked_on(tiny, write, tmp_path, monkeypatch):
    def slowly(*args):
        time.sleep(0.3)
        return listed(*args)

    listed = load.list_source
    monkeypatch.setattr(load, "list_source", slowly)
    monkeypatch.setattr(terminal, "LONG", (0.1, 0.1))
    tiny["models"]["standard"]["train"]["batch_size"] = 64
    args = [str(write(tiny)), "--store", str(tmp_path / "s"), "--only", "standard"]
    remark = (
        "models.standard.train: batch_size 64 makes 3 steps an epoch of 192 images, which is little to learn from; "
        "batch_size 16 makes 12\n"
    )
    planned = CliRunner().invoke(main, ["plan", *args])
    assert planned.exit_code == 0 and planned.stdout.partition("\nTime and size: ")[0].endswith(remark)
    assert planned.stderr.startswith("checking datasets/clean, 0:00:00 so far\n")
    made = CliRunner().invoke(main, ["run", *args, "--engine", "inline"])
    assert made.exit_code == 0 and remark in made.stderr
    again = CliRunner().invoke(main, ["plan", *args])
    assert remark not in again.stdout, "it is made"
