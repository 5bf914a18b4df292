"""`python -m service.cli` is `ldm`."""

import signal
import sys

from service.cli.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
