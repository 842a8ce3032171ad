"A stand-in for the torchao of Kaggle's image: too old for peft, which says so as soon as it looks for it."
__version__ = '0.10.0'
