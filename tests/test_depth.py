"The states of every depth from one pass: those of a model that has only so many layers."
import datasets
import numpy as np
import pytest
import torch
from fixtures import FAMILIES, NEW_FAMILIES, make_base

from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.text.prompt import PromptConfig, Prompter
from underdog.text.source import RowSource
from underdog.training.depth import depth_features
from underdog.training.probe import pair_features


@pytest.mark.parametrize('family', [*FAMILIES, *NEW_FAMILIES])
def test_a_depth_is_the_model_with_so_many_layers(family, tmp_path):
    base = make_base(tmp_path/'base', family, num_hidden_layers=3)
    load = lambda layers=0: load_model(ModelConfig(base, layers=layers, rank=0, quantization='none'), tuned=False)
    prompter, rng = Prompter(PromptConfig(max_length=64, min_keep=4), base), np.random.default_rng(0)
    text = lambda: [''.join(rng.choice(list('abcdefgh '), 12))]
    rows = [dict(prompt=text(), response_a=text(), response_b=text()) for _ in range(5)]
    source = lambda model: RowSource(datasets.Dataset.from_list([prompter.segments(r) for r in rows]), prompter,
                                     model.packing)
    whole = load()
    before = pair_features(whole, source(whole), np.arange(5))
    states = depth_features(whole, source(whole), np.arange(5), [1, 2, 3])
    for depth, of_depth in enumerate(states, 1):
        cut = load(depth)
        torch.testing.assert_close(of_depth, pair_features(cut, source(cut), np.arange(5)), rtol=0, atol=2e-6)
    # and the model is what it was: the last layer reads what is kept
    torch.testing.assert_close(pair_features(whole, source(whole), np.arange(5)), before, rtol=0, atol=2e-6)
