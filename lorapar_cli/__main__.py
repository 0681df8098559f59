"""Entry point; an interrupt shows no traceback, even while modules are still being imported."""

import sys


def main() -> None:
    try:
        if sys.argv[1:] in ([], ["--help"], ["-h"], ["--version"]):
            from importlib.metadata import version

            from lorapar_cli import commands

            print(version("lorapar") if sys.argv[1:] == ["--version"] else commands.usage())
        else:
            from lorapar_cli.app import main as run

            run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
