import pytest

from trocar.anatomy import TINY, Anatomy, tiny_inputs, tiny_model


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_model_runs_and_resolves(name):
    model = tiny_model(name)
    model(**tiny_inputs(model))
    for tower in Anatomy.of(model).towers.values():
        assert tower.n_layers == 3
        assert tower.heads(0) == 4
