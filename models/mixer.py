"""ConvNeXt's block, of which the embedded bundle's pyramid and its SAM's neck are made."""

from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional


class Mixer(nn.Module):
    """What lies around each place by channel, then channels among themselves; a way around both."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        self.around = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.widen = nn.Conv2d(channels, expansion * channels, kernel_size=1)
        self.narrow = nn.Conv2d(expansion * channels, channels, kernel_size=1)
        for weight in self.narrow.parameters():  # at first it changes nothing
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same, quickest with channels last in memory."""
        places = normed(self.norm, self.around(x)).permute(0, 2, 3, 1)
        wide = functional.gelu(functional.linear(places, self.widen.weight.flatten(1), self.widen.bias))
        narrow = functional.linear(wide, self.narrow.weight.flatten(1), self.narrow.bias)
        return x + narrow.permute(0, 3, 1, 2)


def normed(norm: LayerNorm2d, x: Tensor) -> Tensor:
    """What `norm` does to (B, C, h, w), in one pass where channels are last in memory."""
    places = functional.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return places.permute(0, 3, 1, 2)
