"""The documents of an export: its model card and its bill of materials."""

from __future__ import annotations

import json
from typing import get_args

from moe_train import config
from moe_train.checkpoint.model_dir import LoadedWeights, OpenedModel
from moe_train.checkpoint.runs import run_folder
from moe_train.governance import ml_bom, model_card
from moe_train.governance.lineage import Lineage, training_of
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected
from moe_train.weights import serve
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.on_disk import Carried
from moe_train.weights.wrappers.towers import PixtralSettings


def documents_of_export(
    opened: OpenedModel,
    loaded: LoadedWeights,
    name: str,
    layout: serve.ExportFormat,
    merge: bool,
    carried: Carried | None,
) -> dict[str, str]:
    """Return file name -> text of the documents that are written beside the weights.

    Args:
        opened: the run or model that is exported.
        loaded: its weights, and the checkpoint that they come from.
        name: name of the export.
        layout: format of its files.
        merge: whether adapters are merged into the model.
        carried: the tower that the files, or the base of an adapter, have besides the text model; None for a text model.
    """
    lora = opened.lora if merge or layout in get_args(expected.AdapterLayout) else None
    training = None
    if opened.run is not None and loaded.about is not None and loaded.step is not None:
        training = training_of(run_folder(opened.directory), opened.run, loaded.about, loaded.step)
    num_parameters = _num_parameters(loaded.weights, lora, merge)
    lineage = Lineage(name, layout, opened.model, lora, num_parameters, str(opened.directory), training)
    if carried is not None:
        lineage = lineage._replace(carried_input="image" if isinstance(carried.settings, PixtralSettings) else "audio")
    bill = json.dumps(ml_bom.ml_bom(lineage), indent=1, ensure_ascii=False) + "\n"
    return {model_card.MODEL_CARD_FILE: model_card.model_card(lineage), ml_bom.ML_BOM_FILE: bill}


def _num_parameters(weights: LazyParameters, lora: config.Lora | None, merge: bool) -> int:
    """Return the number of parameters in the files.

    Args:
        weights: all weights of the model, adapters included.
        lora: the adapters that are written or merged; None for a model without any.
        merge: whether they are merged, after which they are no parameters of their own.
    """
    total = 0
    for name, array in weights.items():
        path = ParameterPath.parse(name)
        if lora is None or (merge and not path.is_adapter) or (not merge and path.is_trained(lora)):
            total += array.size
    return total
