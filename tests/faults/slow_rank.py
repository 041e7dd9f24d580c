"""main_pretrain.py, whose rank 1 begins three seconds late."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import main_pretrain
from util.errors import run_main

if os.environ['RANK'] == '1':
    time.sleep(3)
run_main(lambda: main_pretrain.main(main_pretrain.get_args_parser().parse(stage='pretrain')))
