"""The tables of a recipe, and which class checks each of them."""

import pkgutil

TABLES = {
    "target": "thresher.harvest.target:TargetConfig",
    "data": "thresher.harvest.corpus:DataConfig",
    "harvest": "thresher.harvest.settings:HarvestConfig",
    "dictionary": "thresher.train.dictionary.spec:DictionaryConfig",
    "train": "thresher.train.config:TrainConfig",
    "parallel": "thresher.train.mesh:ParallelConfig",
    "evaluate": "thresher.evaluate.run:EvaluateConfig",
    "pretrain": "thresher.harvest.pretraining.settings:PretrainConfig",
    "reference": "thresher.recipes.reference:ReferenceConfig",
}
"""Named, not imported: completion reads their source, since importing them loads PyTorch."""


def known_tables() -> dict[str, type]:
    """The class of every table, by the table's name."""
    return {table: pkgutil.resolve_name(place) for table, place in TABLES.items()}
