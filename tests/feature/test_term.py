"""What the feature term takes: options that there are, and maps of one batch."""

import pytest
import torch

from sfr.feature.term import feature_terms

MISSPELT = {"cost": "l2", "grouping": "segment", "marginals": "croos", "matching": "inplace", "solver": "exakt"}


@pytest.mark.parametrize("option", [*MISSPELT, "max_grid"])
def test_an_option_that_there_is_not_is_an_error_that_names_it(option):
    maps = {"a": torch.randn(2, 8, 4, 4), "b": torch.randn(2, 16, 4, 4)}
    with pytest.raises(ValueError, match=f"{option} must be"):
        feature_terms(maps, **{option: MISSPELT.get(option, 0)})


@pytest.mark.parametrize("sizes", [(2, 3), (0, 0)])
@pytest.mark.parametrize("cost", ["cosine", "correlation"])
def test_maps_that_are_not_of_one_batch_are_an_error(sizes, cost):
    maps = {name: torch.randn(size, 8, 4, 4) for name, size in zip("ab", sizes, strict=True)}
    with pytest.raises(ValueError, match=r"maps must be of one batch of at least one image; got \{'a': "):
        feature_terms(maps, cost=cost)
