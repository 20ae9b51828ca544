"""The command of the project: python cli.py fit --config config.yaml."""

from data import ToneData
from lightning.pytorch.cli import LightningCLI
from model import MyMAML

if __name__ == "__main__":
    LightningCLI(MyMAML, ToneData, save_config_kwargs={"overwrite": True})
