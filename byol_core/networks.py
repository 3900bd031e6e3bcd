"""The four parts of BYOL as plain modules: heads, online network, target network, and the pair of them."""

import copy

import torch
from torch import Tensor, nn

from byol_core.ema import ema_update


def mlp_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear: the projector and the predictor. (B, in_dim) -> (B, out_dim).

    Source: paper section 3.3; no batch norm on the output.
    """
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


class OnlineNetwork(nn.Module):
    """prediction = predictor(projector(backbone(image))): the network that gradients train. (B, C, S, S) -> (B, out)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images).flatten(1)  # (B, feature_dim)
        return self.predictor(self.projector(features))


class TargetNetwork(nn.Module):
    """projection = projector(backbone(image)), never trained by gradient: it follows the online network by `ema_update`.

    It runs in train mode beside the online network and owns its batch-norm statistics, as in the reference code.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.requires_grad_(False)

    @torch.no_grad()
    def initialize(self, online: OnlineNetwork) -> None:
        """Copy the online backbone and projector, parameters and buffers, and freeze the copy.

        Raises: ValueError naming the first tensor that does not fit, with nothing changed.
        """
        ema_update(self, online, 0.0, buffers="copy")
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images).flatten(1))


class BYOL(nn.Module):
    """An online network and the target that follows it, from one backbone.

    backbone: any module that maps (B, C, S, S) to (B, feature_dim) or (B, feature_dim, 1, 1), with any number of
    channels C. feature_dim: its output width. hidden_dim, out_dim: of projector and predictor.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        projector = mlp_head(feature_dim, hidden_dim, out_dim)
        self.target = TargetNetwork(copy.deepcopy(backbone), copy.deepcopy(projector))
        self.online = OnlineNetwork(backbone, projector, mlp_head(out_dim, hidden_dim, out_dim))
        self.target.initialize(self.online)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions p1, p2 of the online network and projections z1, z2 of the target, each (B, out_dim).

        One forward per view, so that batch statistics are those of one view.
        """
        return self.online(view1), self.online(view2), self.target(view1), self.target(view2)
