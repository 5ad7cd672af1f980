# SPDX-License-Identifier: MIT
"""The networks of "Rare Gems" (arXiv 2202.12002, Tables 5 to 7) as plain modules that know nothing about pruning.

                  weights   tensors   classes   source
    resnet20      268,336      20        10     Table 5; He et al. (2016) for CIFAR, option-A shortcuts
    resnet32      467,632      32       100     the same, five blocks a stage
    resnet32x2  1,856,864      32       100     twice as wide: what the authors ran for CIFAR-100 (Fig. 4a)
    resnet18   11,164,352      21        10     Appendix B; 3x3 stem for 32x32 images
    resnet18   11,269,312      21       200     Table 5; 7x7 stem and max-pool for larger images
    resnet50   23,864,512      54       200     Table 5; 7x7 stem, parameters named as in torchvision
    vgg16      14,715,584      14        10     Table 6; 13 convolutions and one linear layer
    mobilenetv2 2,261,824      58        10     Table 7 and the four 1x1 shortcuts that it leaves out
    wrn28_2     1,463,984      29        10     Table 5; Zagoruyko & Komodakis (2016)

"weights" counts what can be pruned: every Conv and Linear weight, projection shortcuts included. There is
no bias anywhere, and BatchNorm has no affine parameters (Appendix A.2) unless affine=True.
Every network maps images (B, 3, H, W) to logits (B, num_classes).
"""

from functools import partial

import torch.nn.functional as F
from torch import nn


def conv(c_in, c_out, kernel=3, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(c_in, c_out, kernel=3, stride=1, groups=1, affine=False):
    return conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out, affine=affine)


def stages(block, c_in, spec, **kw):
    """One Sequential of blocks for each (channels, repeats, stride) in spec; only the first block strides."""
    result = []
    for channels, repeats, stride in spec:
        blocks = []
        for i in range(repeats):
            blocks.append(block(c_in, channels, stride if i == 0 else 1, **kw))
            c_in = channels * block.expansion
        result.append(nn.Sequential(*blocks))
    return result


class OptionA(nn.Module):
    """He et al.'s parameter-free shortcut: take every second pixel, fill the new channels with zeros."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in, c_out, stride, option="B", affine=False):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c_out, 3, stride, affine=affine)
        self.conv2, self.bn2 = conv_bn(c_out, c_out, affine=affine)
        if stride == 1 and c_in == c_out:
            self.downsample = nn.Identity()
        elif option == "A":
            self.downsample = OptionA(c_out - c_in)
        else:
            self.downsample = nn.Sequential(*conv_bn(c_in, c_out, 1, stride, affine=affine))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, c, stride, affine=False):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c, 1, affine=affine)
        self.conv2, self.bn2 = conv_bn(c, c, 3, stride, affine=affine)
        self.conv3, self.bn3 = conv_bn(c, 4 * c, 1, affine=affine)
        self.downsample = nn.Identity()
        if stride != 1 or c_in != 4 * c:
            self.downsample = nn.Sequential(*conv_bn(c_in, 4 * c, 1, stride, affine=affine))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """stem (3 or 7: kernel size) -> stages -> global average pool -> linear. Names follow torchvision."""

    def __init__(self, block, spec, num_classes, affine, stem=3, **kw):
        super().__init__()
        width = spec[0][0]
        self.conv1, self.bn1 = conv_bn(3, width, stem, 1 if stem == 3 else 2, affine=affine)
        self.maxpool = nn.Identity() if stem == 3 else nn.MaxPool2d(3, 2, 1)
        self.n_stages = len(spec)
        for i, stage in enumerate(stages(block, width, spec, affine=affine, **kw), 1):
            setattr(self, f"layer{i}", stage)
        self.fc = nn.Linear(spec[-1][0] * block.expansion, num_classes, bias=False)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(self.n_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Module):
    def __init__(self, num_classes, affine):
        super().__init__()
        layers, c_in = [], 3
        for c in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            if c == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [*conv_bn(c_in, c, affine=affine), nn.ReLU()]
                c_in = c
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(512, num_classes, bias=False)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1. The shortcut exists at stride 1; it is a 1x1 where channels change."""

    expansion = 1

    def __init__(self, c_in, c_out, stride, t=6, affine=False):
        super().__init__()
        c, self.residual = t * c_in, stride == 1
        self.conv1, self.bn1 = conv_bn(c_in, c, 1, affine=affine)
        self.conv2, self.bn2 = conv_bn(c, c, 3, stride, groups=c, affine=affine)
        self.conv3, self.bn3 = conv_bn(c, c_out, 1, affine=affine)
        self.downsample = nn.Identity()
        if self.residual and c_in != c_out:
            self.downsample = nn.Sequential(*conv_bn(c_in, c_out, 1, affine=affine))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.downsample(x) if self.residual else out


class MobileNetV2(nn.Module):
    SPEC = ((24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))

    def __init__(self, num_classes, affine):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 32, affine=affine)
        first = InvertedResidual(32, 16, 1, t=1, affine=affine)
        self.blocks = nn.Sequential(first, *stages(InvertedResidual, 16, self.SPEC, affine=affine))
        self.conv2, self.bn2 = conv_bn(320, 1280, 1, affine=affine)
        self.fc = nn.Linear(1280, num_classes, bias=False)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class WideBlock(nn.Module):
    """Pre-activation block: BatchNorm and ReLU come before each convolution."""

    expansion = 1

    def __init__(self, c_in, c_out, stride, affine=False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in, affine=affine), conv(c_in, c_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out, affine=affine), conv(c_out, c_out)
        self.shortcut = conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.shortcut is not None:  # a projection takes the activated input, as in the source
            x = self.shortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    def __init__(self, num_classes, affine):
        super().__init__()
        spec = ((32, 4, 1), (64, 4, 2), (128, 4, 2))  # depth 28: (28 - 4) / 6 blocks a stage, twice as wide as a ResNet
        self.conv1 = conv(3, 16)
        self.blocks = nn.Sequential(*stages(WideBlock, 16, spec, affine=affine))
        self.bn = nn.BatchNorm2d(128, affine=affine)
        self.fc = nn.Linear(128, num_classes, bias=False)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


def cifar_resnet(n, width, num_classes, affine):
    spec = ((width, n, 1), (2 * width, n, 2), (4 * width, n, 2))
    return ResNet(BasicBlock, spec, num_classes, affine, option="A")


def resnet18(num_classes, affine, image_size):
    # Table 5 prints a 3x3 stem with stride 2 and padding 3, which fits a 7x7: the authors ran a 7x7.
    spec = ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))
    return ResNet(BasicBlock, spec, num_classes, affine, stem=3 if image_size <= 32 else 7)


def resnet50(num_classes, affine):
    spec = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
    return ResNet(Bottleneck, spec, num_classes, affine, stem=7)


MODELS = {
    "resnet20": partial(cifar_resnet, 3, 16),
    "resnet32": partial(cifar_resnet, 5, 16),
    "resnet32x2": partial(cifar_resnet, 5, 32),
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg16": VGG16,
    "mobilenetv2": MobileNetV2,
    "wrn28_2": WideResNet,
}


def build(name, num_classes=10, affine=False, image_size=32):
    """The network called `name` (a key of MODELS; else KeyError) for num_classes classes.

    affine: give BatchNorm its scale and shift (only the Caltech-101 transfer of Appendix A.3.1 does).
    image_size: side of the images in pixels; it decides the stem of resnet18 and nothing else.
    """
    sized = {"image_size": image_size} if name == "resnet18" else {}
    return MODELS[name](num_classes, affine, **sized)
