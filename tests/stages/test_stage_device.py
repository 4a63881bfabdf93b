"""A process's device, precision and kernels: settings are read back from PyTorch."""

import os
import re
import subprocess
import sys

import pytest
import torch

from stages.device import computing, device, kind, numbers, settings, threads
from stages.recipes import Attack, Compute, Evaluate, Train

EXACT = {"tf32": False, "deterministic": True}


def ambient():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.get_num_threads(), cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32",
        cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip


def train(**keys):
    return Train(on="d", arch="small_cnn", **keys)


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Compute(), EXACT),
        (Compute(precision="bfloat16"), EXACT),
        (Compute(precision="tf32"), {"tf32": True, "deterministic": True}),
        (Compute(deterministic=False), {"tf32": False, "deterministic": False}),
        (Attack(images="d", model="m", precision="tf32"), {"tf32": True, "deterministic": True}),
        (train(), EXACT),
        (train(precision="tf32", deterministic=False), {"tf32": True, "deterministic": False}),
        (Evaluate(models=["m"], on="d"), EXACT),
    ],
)
def test_a_recipe_sets_numbers_and_kernels_and_what_was_before_comes_back(recipe, wanted):
    before = ambient()
    with pytest.raises(KeyError), computing(recipe):
        assert settings() == wanted
        assert torch.get_num_threads() == getattr(recipe, "threads", 1)
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert ambient() == before


@pytest.mark.parametrize("newer", [False, True])
def test_what_a_users_module_asked_for_does_not_change_what_a_recipe_computes(newer):
    before = ambient()
    try:
        if newer:
            torch.backends.fp32_precision = "tf32"
        else:
            torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision("medium")
        with computing(Compute()):
            assert settings() == EXACT
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32  # the older interface, which libraries ask
            assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.set_float32_matmul_precision("highest")


def test_a_model_computes_at_its_own_precision_whatever_is_around_it(trained):
    seen = []
    trained.network.register_forward_hook(lambda *_: seen.append(settings()["tf32"]))
    x = torch.zeros(1, 1, 8, 8)
    with numbers("tf32"):
        trained(x)
        trained.using("tf32")(x)
        assert settings()["tf32"]
    trained.using("tf32")(x)
    assert seen == [False, True, True]


def test_on_a_processor_tf32_is_float32(trained):
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(trained.using("tf32")(x), trained(x))


def test_the_number_of_threads_comes_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(3):
        assert torch.get_num_threads() == 3
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_workspace_of_cublas_is_asked_for_before_it_is_used():
    code = "import stages.model, os; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ":4096:8\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP reports how long it spins")
@pytest.mark.parametrize(("ours", "short"), [({}, True), ({"OMP_WAIT_POLICY": "ACTIVE"}, False)])
def test_threads_that_wait_for_each_other_spin_for_a_short_time_unless_the_user_decides(ours, short):
    asked = {"PATH": os.environ["PATH"], "OMP_DISPLAY_ENV": "VERBOSE", **ours}
    code = "import stages.model"
    ran = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    (count,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ran.stderr)
    assert (int(count) < 10_000) == short, "OpenMP itself reports what holds"


def test_a_kind_of_device_says_what_its_kernels_are_chosen_by():
    assert device().type == "cpu"
    assert torch.backends.cpu.get_cpu_capability() in kind()
