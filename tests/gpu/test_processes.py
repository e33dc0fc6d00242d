"""Two processes train on the device.

NCCL refuses two processes on one GPU, so they speak over gloo, which takes tensors of a GPU by way of the host. What is
tested is thus all but NCCL itself: the wrapped network on its device, its hooks, and the handlers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from shared_networks.errors import input_error_in
from shared_networks.training import host_copy
from shared_networks.training.handlers import TrainingHandlers
from shared_networks.training.resume import TrainingRun
from tests.training.test_resume import Late, a_record
from tests.workflows.test_distributed import WORLD, batch, gradients, network

EXIT = 3  # code of a process that stopped as it should


def wrapped(net: nn.Module, device: torch.device) -> DistributedDataParallel:
    net = net.to(device)
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)


def half_of_the_batch(rank: int, folder: str, name: str) -> None:
    device = torch.device(name)
    join(rank, folder)
    images, ids_shuffle = (tensor.chunk(WORLD)[rank].to(device) for tensor in batch())
    grads = gradients(wrapped(network(), device), images, ids_shuffle)
    assert {grad.device for grad in grads.values()} == {device}
    torch.save({name: grad.cpu() for name, grad in grads.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path, device: torch.device) -> None:
    mp.spawn(half_of_the_batch, (str(tmp_path), str(device)), nprocs=WORLD)
    joined = gradients(network(), *batch())
    for rank in range(WORLD):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert part.keys() == joined.keys()
        for name, grad in joined.items():
            torch.testing.assert_close(part[name], grad, rtol=1e-3, atol=1e-6)


def train_on_a_bad_case(rank: int, folder: str, name: str, late: bool) -> None:
    """Rank 1 alone has a case of NaN, in the third of four iterations; a state is saved after each of them."""
    device = torch.device(name)
    join(rank, folder)
    torch.manual_seed(0)
    bare = nn.Linear(4, 1).to(device)
    cases: list[dict[str, Any]] = [
        {"image": torch.ones(4) * (i + 1), "label": torch.ones(1), "case": f"case{rank}{i}"} for i in range(4)
    ]
    if rank == 1:
        cases[2]["image"] = torch.full((4,), torch.nan)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.01)
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(cases), batch_size=1),
        network=wrapped(bare, device),
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[TrainingHandlers(bare, optimizer, schedule, seed=0)],
        decollate=False,
    )
    evaluator = SupervisedEvaluator(device=device, val_data_loader=DataLoader(Dataset([])), network=bare)
    run = TrainingRun(
        f"{folder}/run", bare, optimizer, schedule, trainer, evaluator, a_record(), every_minutes=0.0, keep=9
    )
    with mock.patch.object(host_copy, "HostCopy", Late if late else host_copy.HostCopy):
        try:
            run.run()
        except Exception as error:  # of gloo, where the other process has gone
            found = input_error_in(error)
            Path(folder, f"error{rank}").write_text(str(found or f"connection: {error}"))
            raise SystemExit(EXIT) from None


@pytest.mark.parametrize("late", [False, True], ids=["as on this device", "late"])
def test_weights_that_one_process_has_spoiled_are_saved_by_none(
    tmp_path: Path, device: torch.device, late: bool
) -> None:
    context = mp.get_context("spawn")
    arguments = [(rank, str(tmp_path), str(device), late) for rank in range(WORLD)]
    processes = [context.Process(target=train_on_a_bad_case, args=words) for words in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [EXIT] * WORLD
    errors = [(tmp_path / f"error{rank}").read_text() for rank in range(WORLD)]
    assert "the loss is nan in iteration 3 (epoch 1), with the cases case12 of this process" in errors[1]
    if late or device.type == "cuda":  # both have taken the gradient
        assert "the norm of the gradient is nan in iteration 3" in errors[0] or errors[0].startswith("connection")
    states = sorted((tmp_path / "run" / "state").glob("*.ckpt"))
    assert [file.stem for file in states] == ["state_000000001", "state_000000002"]
    for file in states:
        weights = torch.load(file, weights_only=True)["network"]
        assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "run" / "model.pt").exists()
