"""Run the client's commands: embed | compare | rank | ready. The folder client has their code."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not Path(__file__).with_name("client").is_dir():
        print(
            "client.py: its code is in the folder client; put it beside this file", file=sys.stderr
        )
        sys.exit(2)
    from client.cli import main  # Python prefers the folder to this file

    sys.exit(main())
