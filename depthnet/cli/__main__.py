import sys

from depthnet.cli import main

sys.exit(main())
