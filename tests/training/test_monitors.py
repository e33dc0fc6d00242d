from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, from_engine
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from shared_networks.evaluation.metrics import OrganDice, OrganMetric
from shared_networks.figures.overlay import OverlayPanel
from shared_networks.figures.reconstruction import ReconstructionPanel
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.training.handlers import ClipGradients, PrepareBatchSelfSupervised
from shared_networks.training.loss import MaskedPatchLoss
from shared_networks.training.monitors import FeatureSpread, TrainingMonitor

SIZE = 12
BATCHES = 3


def network() -> HiEndMAE:
    torch.manual_seed(0)
    vit = {"img_size": SIZE, "patch_size": 6, "hidden_size": 12, "num_heads": 2, "num_layers": 4, "out_indices": (1, 2)}
    return HiEndMAE(**vit, decoder_hidden_size=12, decoder_num_heads=2, decoder_self_layers=1)


class Slow(Dataset):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.02)
        return super().__getitem__(index)


def loader(kind: type = Dataset) -> DataLoader:
    torch.manual_seed(1)
    data = [{"image": torch.rand(1, SIZE, SIZE, SIZE)} for _ in range(2 * BATCHES)]
    return DataLoader(kind(data), batch_size=2)


def train(net: HiEndMAE, data: DataLoader, lr: float = 0.25) -> dict[str, float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    engine = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=net,
        optimizer=optimizer,
        loss_function=MaskedPatchLoss(6),
        prepare_batch=PrepareBatchSelfSupervised(),
        train_handlers=[ClipGradients(net), TrainingMonitor(optimizer)],
        decollate=False,
    )
    started = time.perf_counter()
    engine.run()
    return {**engine.state.metrics, "seconds": time.perf_counter() - started}


def test_an_epoch_reports_its_health() -> None:
    metrics = train(network(), loader())
    assert metrics["learning_rate"] == 0.25
    assert 0 < metrics["grad_norm"] < 100
    assert 6 / metrics["seconds"] <= metrics["crops_per_second"]
    assert 0 <= metrics["data_wait"] < 1


def test_a_starved_network_shows() -> None:
    starved = train(network(), loader(Slow))
    assert starved["data_wait"] > train(network(), loader())["data_wait"]
    assert starved["crops_per_second"] < 6 / (6 * 0.02)  # it slept so long
    assert starved["data_wait"] * 6 / starved["crops_per_second"] >= 6 * 0.02 * 0.99


def evaluate(net: HiEndMAE, *handlers: Any) -> SupervisedEvaluator:
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader(),
        network=net,
        prepare_batch=PrepareBatchSelfSupervised(),
        val_handlers=list(handlers),
        decollate=False,
    )
    engine.run(7)
    return engine


def test_feature_spread_is_the_deviation_over_all_tokens_of_each_block() -> None:
    net = network()
    metrics = evaluate(net, FeatureSpread(net)).state.metrics
    seen: dict[int, list[Tensor]] = {1: [], 2: []}
    net.eval()
    with torch.no_grad():
        for batch in loader():
            _, features = net.encode(batch["image"], net.shuffle(2, 8))
            for feature, tokens in zip(seen, features, strict=True):
                seen[feature].append(tokens[:, 1:].flatten(0, 1))
    for feature, tokens in seen.items():
        assert metrics[f"spread_block_{feature}"] == pytest.approx(
            torch.cat(tokens).std(0, correction=0).mean().item(), 1e-4
        )
    assert not any(module._forward_hooks for module in net.modules())  # training pays nothing


def test_a_collapsed_encoder_shows() -> None:
    net = network()
    for name, parameter in net.vit.named_parameters():
        if name.startswith("blocks.2") or "patch_embedding" in name:
            nn.init.zeros_(parameter)
    assert evaluate(net, FeatureSpread(net)).state.metrics["spread_block_2"] < 1e-6


def test_a_validation_draws_one_panel_at_its_epoch(tmp_path: Path) -> None:
    evaluate(network(), ReconstructionPanel(tmp_path, 6, (1.5, 1.5, 3.0)))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("reconstruction")
    assert image.step == 7
    assert image.width > 300 and image.height > 300


def test_organs_get_curves_and_the_first_case_a_picture(tmp_path: Path) -> None:
    names = ["background", "left kidney/ureter", "liver", "spleen"]
    image = MetaTensor(torch.rand(1, 12, 10, 8), affine=torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
    truth = MetaTensor(torch.zeros(1, 12, 10, 8), affine=image.affine)
    truth[:, 2:6, 2:6, 2:6] = 1
    truth[:, 8:, 2:6, 2:6] = 2
    answer = truth.clone()
    answer[:, 4:6] = 0  # half of the kidney is missed: Dice 2/3
    logits = torch.nn.functional.one_hot(answer.as_tensor().long(), 4).movedim(-1, 1)[0].float()
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{"image": image, "label": truth}]), batch_size=1),
        network=nn.Identity(),
        inferer=Answer(logits),
        postprocessing=AsDiscreted(keys="pred", argmax=True),
        key_val_metric={
            "val_mean_dice": IgniteMetricHandler(
                metric_fn=OrganMetric(names, None), output_transform=from_engine(["pred", "label"])
            )
        },
        val_handlers=[OrganDice(names), OverlayPanel(tmp_path, names)],
    )
    engine.run(3)
    assert engine.state.metrics["dice_left_kidney_ureter"] == pytest.approx(2 / 3)
    assert engine.state.metrics["dice_liver"] == 1
    assert "dice_spleen" not in engine.state.metrics  # no case has one
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (picture,) = events.Images("overlay")
    assert picture.step == 3 and picture.width > 300


class Answer(SimpleInferer):
    """Gives the same logits whatever is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.logits[None]
