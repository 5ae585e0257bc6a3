"""`python -m zokern` reports on the installation; with arguments it is the `zokern` command."""

import sys

if len(sys.argv) > 1:
    from zokern.cli import app

    app(prog_name="zokern")
else:
    from zokern.report import main

    sys.exit(main())
