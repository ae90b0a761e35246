import sys

from torchtitan_lite.cli import main

sys.exit(main())
