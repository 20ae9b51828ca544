"""The command of the project: python cli.py fit --config config.yaml."""

from data import ToneData
from model import MyMAML

from lightning_maml.cli import FewShotCLI

if __name__ == "__main__":
    FewShotCLI(MyMAML, ToneData)
