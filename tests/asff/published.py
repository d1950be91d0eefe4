"""The published module, written down from its formula: every map is enlarged, then fused."""

import torch
import torch.nn.functional as F


def block(in_channels, out_channels, kernel, stride=1):
    stage = torch.nn.Sequential()
    padding = kernel // 2
    conv = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    stage.add_module("conv", conv)
    stage.add_module("batch_norm", torch.nn.BatchNorm2d(out_channels))
    stage.add_module("leaky", torch.nn.LeakyReLU(0.1))
    return stage


class PublishedASFF(torch.nn.Module):
    def __init__(self, level, channels, out_channels, weight_channels):
        super().__init__()
        self.level = level
        width = channels[level]
        if level == 0:
            self.stride_level_1 = block(channels[1], width, 3, 2)
            self.stride_level_2 = block(channels[2], width, 3, 2)
        elif level == 1:
            self.compress_level_0 = block(channels[0], width, 1)
            self.stride_level_2 = block(channels[2], width, 3, 2)
        else:
            self.compress_level_0 = block(channels[0], width, 1)
            if channels[1] != width:
                self.compress_level_1 = block(channels[1], width, 1)
        self.weight_level_0 = block(width, weight_channels, 1)
        self.weight_level_1 = block(width, weight_channels, 1)
        self.weight_level_2 = block(width, weight_channels, 1)
        self.weight_levels = torch.nn.Conv2d(3 * weight_channels, 3, 1)
        self.expand = block(width, out_channels, 3)

    def resized(self, x0, x1, x2):
        if self.level == 0:
            pooled = F.max_pool2d(x2, 3, stride=2, padding=1)
            return x0, self.stride_level_1(x1), self.stride_level_2(pooled)
        small = self.compress_level_0(x0)
        if self.level == 1:
            return F.interpolate(small, scale_factor=2), x1, self.stride_level_2(x2)
        middle = self.compress_level_1(x1) if hasattr(self, "compress_level_1") else x1
        return F.interpolate(small, scale_factor=4), F.interpolate(middle, scale_factor=2), x2

    def forward(self, x0, x1, x2):
        maps = self.resized(x0, x1, x2)
        branches = (self.weight_level_0, self.weight_level_1, self.weight_level_2)
        values = torch.cat([branch(x) for branch, x in zip(branches, maps, strict=True)], 1)
        weights = torch.softmax(self.weight_levels(values), 1)
        fused = sum(x * w.unsqueeze(1) for x, w in zip(maps, weights.unbind(1), strict=True))
        return self.expand(fused), weights
