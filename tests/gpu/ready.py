"""What the tests on a GPU lack, a line for each thing; exit code 2 if that is anything. Needs no package itself."""

import importlib.util
import sys

NEEDED = {  # what is imported: what is installed
    **dict(torch='torch', torchvision='torchvision', timm='timm', numpy='numpy', yaml='pyyaml', PIL='pillow'),
    **dict(safetensors='safetensors', tensorboard='tensorboard', pytest='pytest', pycocotools='pycocotools'),
}


def lacking() -> list[str]:
    missing = [package for module, package in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        return [f'{sys.executable} has no {package}: pip install {package}' for package in missing]
    import torch

    found = torch.cuda.is_available()
    return [] if found else [f'torch {torch.__version__} of {sys.executable} sees no GPU, which these tests need']


if __name__ == '__main__':
    for line in (lines := lacking()):
        print(line, file=sys.stderr)
    sys.exit(2 if lines else 0)
