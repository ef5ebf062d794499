"""Entry point of `python -m lora_ext`."""

import sys

from lora_ext.cli import main

sys.exit(main())
