"""Two processes on the CPU (gloo): the same gradients as one, different draws, and a clean end when one dies."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai.engines import SupervisedTrainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.training.handlers import ReduceOnStep, SeedIterations
from shared_networks.training.loss import MaskedPatchLoss
from tests.conftest import ROOT
from tests.training.test_resume import SMALL, environment, loss_curve, signal_at

pytestmark = pytest.mark.slow

WORLD = 2


def network() -> HiEndMAE:
    torch.manual_seed(0)
    vit = {"img_size": 12, "patch_size": 6, "hidden_size": 12, "num_heads": 2, "num_layers": 4, "out_indices": (1, 2)}
    return HiEndMAE(**vit, decoder_hidden_size=12, decoder_num_heads=2, decoder_self_layers=1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(4, 1, 12, 12, 12, generator=generator), torch.rand(4, 8, generator=generator).argsort(dim=1)


def gradients(net: torch.nn.Module, images: torch.Tensor, ids_shuffle: torch.Tensor) -> dict[str, torch.Tensor]:
    MaskedPatchLoss(6)(net(images, ids_shuffle), images).backward()
    parameters = getattr(net, "module", net).named_parameters()
    return {name: p.grad for name, p in parameters if p.grad is not None}


def one_of_two(rank: int, folder: str) -> None:
    """What each process does: its half of the batch, and the numbers it draws in an iteration."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    images, ids_shuffle = (tensor.chunk(WORLD)[rank] for tensor in batch())
    grads = gradients(DistributedDataParallel(network()), images, ids_shuffle)

    class Engine:
        class state:  # noqa: N801 (as ignite names it)
            iteration = 5

    Engine.state.rank = rank  # type: ignore[attr-defined]
    net = network()
    SeedIterations(0)(Engine)
    mask = net.shuffle(1, 8)
    torch.save({"grads": grads, "mask": mask}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one_and_masks_of_their_own(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=WORLD)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    joined = gradients(network(), *batch())
    for part in parts:
        assert part["grads"].keys() == joined.keys()
        for name, grad in joined.items():
            torch.testing.assert_close(part["grads"][name], grad, rtol=1e-4, atol=1e-7)
    assert not torch.equal(parts[0]["mask"], parts[1]["mask"])


def accumulate(batches: list[torch.Tensor], net: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters after an epoch of three batches, two of which make a step, and then one."""
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": images, "label": images} for images in batches],
        network=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        loss_function=torch.nn.MSELoss(),
        accumulation_steps=2,
        decollate=False,
        train_handlers=[ReduceOnStep()],
    )
    trainer.run()
    return [p.detach().clone() for p in net.parameters()]


def three_batches() -> list[torch.Tensor]:
    return list(torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)))


def half_of_each(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Linear(5, 5))
    reductions = []

    def count(group, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and not as text
        reductions.append(bucket.index())
        return allreduce_hook(group, bucket)

    net.register_comm_hook(None, count)
    parameters = accumulate([images.chunk(WORLD)[rank] for images in three_batches()], net)
    torch.save({"parameters": parameters, "reductions": reductions}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_are_exchanged_once_a_step_however_many_accumulate(tmp_path: Path) -> None:
    mp.spawn(half_of_each, (str(tmp_path),), nprocs=WORLD)
    torch.manual_seed(0)
    alone = accumulate(three_batches(), torch.nn.Linear(5, 5))
    for rank in range(WORLD):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert part["reductions"] == [0, 0]  # one bucket, two steps; the first of three iterations exchanged nothing
        torch.testing.assert_close(part["parameters"], alone)


def start(
    data: Path,
    out: Path,
    *more: str,
    launch: str = f"--standalone --nproc_per_node {WORLD}",
    before: Path | None = None,
) -> subprocess.Popen[str]:
    files = "['configs/train.json','configs/multi_gpu_train.json','configs/tiny.json']"
    words = [sys.executable, "-m", "torch.distributed.run", *launch.split(), "-m", "monai.bundle", "run"]
    words += ["--config_file", files, *SMALL.split(), "--dataset_dir", str(data)]
    words += ["--ckpt_dir", str(out), "--output_dir", str(out), "--training_run#every_minutes", "0", *more]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = environment(before) | {"PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(words, cwd=ROOT / "hi_end_mae_pretrain", env=env, **pipes)


OTHER = (
    "next(int(pid) for pid in pathlib.Path(f'/proc/{os.getppid()}/task/{os.getppid()}/children').read_text().split() "
    "if 'RANK=1\\0' in pathlib.Path(f'/proc/{pid}/environ').read_text())"
)
"""Finds rank 1 in rank 0, which saves, by the launcher of both."""


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-5000:]
    return output


@pytest.fixture(scope="module")
def killed(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of which rank 1 was killed, then resumed; what was seen."""
    out, hook = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("hook") / "before"
    process = start(datasets["btcv"], out, before=signal_at(hook, "state_000000001", "SIGKILL", OTHER))
    process.communicate(timeout=300)  # not the half hour of gloo's timeout
    resumed = finish(start(datasets["btcv"], out, "--resume"))
    return {"out": out, "code": process.returncode, "rank0": (hook / "pid").read_text(), "resumed": resumed}


def test_a_killed_process_ends_the_job(killed: dict[str, Any]) -> None:
    assert killed["code"] != 0


def test_the_restart_resumes_as_two_machines_would_have_run(
    killed: dict[str, Any], datasets: dict[str, Path], tmp_path: Path
) -> None:
    assert "resuming from" in killed["resumed"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint localhost:{port} --rdzv_id test"
    nodes = [start(datasets["btcv"], tmp_path, launch=launch) for _ in range(2)]
    for node in nodes:
        finish(node)
    assert loss_curve(killed["out"]) == pytest.approx(loss_curve(tmp_path), rel=1e-6)


def test_only_rank_0_writes(killed: dict[str, Any]) -> None:
    files = list(killed["out"].glob("events.out.tfevents.*"))
    assert files
    pids = {file.name.split(".")[-2] for file in files}
    assert len(pids) == 2 and killed["rank0"] in pids  # rank 0 of the first run, rank 0 of the second
    assert sorted(f.name for f in killed["out"].iterdir() if "tfevents" not in f.name) == [
        "model.json",
        "model.pt",
        "state",
    ]


def test_sigterm_stops_all_processes_after_the_same_iteration(datasets: dict[str, Path], tmp_path: Path) -> None:
    """A cluster's preemption reaches every process; here one alone, and the other must follow."""
    out, hook = tmp_path / "out", signal_at(tmp_path / "before", "state_000000001", "SIGTERM", OTHER)
    output = finish(start(datasets["btcv"], out, before=hook), 1)  # torchrun's
    assert "stopped by signal 15 at epoch" in output and "exitcode  : 143" in output
    assert "resuming from" in finish(start(datasets["btcv"], out, "--resume"))
