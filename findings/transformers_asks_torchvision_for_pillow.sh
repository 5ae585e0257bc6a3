#!/usr/bin/env bash
# transformers 5.10 to 5.17 refuses AutoImageProcessor without torchvision, though its processors of Pillow are there.
#
# Image processors of transformers 5 come in two kinds, of torchvision and of Pillow, and AutoImageProcessor takes the one
# that can run. In these versions it can't be used without torchvision: any attribute of it raises an ImportError that asks
# for torchvision, while ViTImageProcessorPil works beside it. What a module needs is found by words in its source, and the
# source of AutoImageProcessor names the torchvision kind. From 5.18 on it is looked for as a base class.
#
# It matters to whoever serves or tunes a model of pictures in an environment with Pillow alone, as a CPU's often is. What
# helps: transformers >= 5.18; or torchvision; or the class by its name.
#
# In zokern: `zokern finetune` hands the message on, and docs/finetune.md says which versions want torchvision.
#
# Seen in transformers 5.10.4 and 5.17.0, and no more in 5.18.0, with torch 2.13.0, numpy 2.3.5 and pillow 12.0.0. Needs
# python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.3.5 pillow==12.0.0
PIP_TARGET=transformers-5.10.4 venv/bin/pip install -qq --disable-pip-version-check transformers==5.10.4 numpy==2.3.5
PIP_TARGET=transformers-5.17.0 venv/bin/pip install -qq --disable-pip-version-check transformers==5.17.0 numpy==2.3.5
PIP_TARGET=transformers-5.18.0 venv/bin/pip install -qq --disable-pip-version-check transformers==5.18.0 numpy==2.3.5

mkdir vit
echo '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}' > vit/preprocessor_config.json
cat > processor.py <<'PYTHON'
import transformers
from PIL import Image

picture = Image.new("RGB", (9, 9), (255, 0, 0))
named = transformers.ViTImageProcessorPil.from_pretrained("vit")
print(f"transformers {transformers.__version__}, by its name:", tuple(named(picture, return_tensors="pt")["pixel_values"].shape))
try:
    found = transformers.AutoImageProcessor.from_pretrained("vit")
    print("AutoImageProcessor:", type(found).__name__)
except ImportError as error:
    print("AutoImageProcessor:", str(error).strip().split("\n")[0])
PYTHON
expect() { # version, what is printed of AutoImageProcessor
  local found
  found=$(PYTHONPATH="transformers-$1" venv/bin/python -W ignore processor.py)
  echo "$found"
  [[ "$found" == *"transformers $1, by its name: (1, 3, 8, 8)"*"AutoImageProcessor: $2"* ]] || { echo "CHANGED: expected $2"; exit 1; }
}
expect 5.10.4 "AutoImageProcessor requires the Torchvision library"
expect 5.17.0 "AutoImageProcessor requires the Torchvision library"
expect 5.18.0 "ViTImageProcessorPil"
echo "SEEN: AutoImageProcessor wants torchvision before 5.18, where Pillow is enough"
