from common.cli import run_cli
from common.data import describe

if __name__ == "__main__":
    run_cli(describe.main, describe.Args)
