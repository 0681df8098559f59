"""Entry point; an interrupt shows no traceback, even while modules are still being imported."""

import sys


def main() -> None:
    try:
        if sys.argv[1:] in ([], ["--help"], ["-h"]):
            from lorapar_cli.commands import usage

            print(usage())
        elif sys.argv[1:] == ["--version"]:
            from lorapar_cli.versions import own_version

            print(own_version())
        else:
            from lorapar_cli.app import main as run

            run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
