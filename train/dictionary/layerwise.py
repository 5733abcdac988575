"""One [dictionary] table for several layers that each have a dictionary: what it says to each of them."""

import dataclasses
from typing import TYPE_CHECKING

from thresher.cache.errors import UserError
from thresher.train.dictionary.topologies import topology

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionaryConfig


def of_layers(config: "DictionaryConfig", layers: int) -> list["DictionaryConfig"]:
    """The tables of so many layers' dictionaries, ascending: the same one, but for `k_by_layer`.

    Raises UserError when that has another number of values, and for a kind that has one dictionary of all layers.
    """
    if config.k_by_layer is None:
        return [config] * layers
    told = f"dictionary.k_by_layer is {list(config.k_by_layer)}"
    if topology(config.kind).joint:
        raise UserError(
            f"{told} for kind = {config.kind!r}, one dictionary of all layers; expected a kind with a dictionary per "
            "layer, such as 'transcoder'. Set k."
        )
    if len(config.k_by_layer) != layers or not layers:
        raise UserError(
            f"{told}; expected one k for each layer with a dictionary, of which there are {layers}. Give as many, "
            "choose layers by dictionary.layers, or set k."
        )
    return [dataclasses.replace(config, k=k, k_by_layer=None) for k in config.k_by_layer]
