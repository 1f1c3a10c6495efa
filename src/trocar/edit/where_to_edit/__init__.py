"""Where-to-Edit: fix a failure by fine-tuning the few rows and columns that a hypernetwork points at (arXiv 2411.01948). Floor 5."""

from trocar.edit.where_to_edit.config import CutMixConfig, EditConfig, HypernetworkConfig, LabelConfig
from trocar.edit.where_to_edit.cutmix import cutmix_pairs
from trocar.edit.where_to_edit.edit import edit, edit_many, edit_sequence, predict_masks
from trocar.edit.where_to_edit.hypernetwork import MaskHypernetwork
from trocar.edit.where_to_edit.labels import calibrate, centred_log, first_order_labels, mask_labels
from trocar.edit.where_to_edit.masks import gradient_norms, magnitudes, top_k
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.results import EditResult, Edits
from trocar.edit.where_to_edit.suffix import Rows
from trocar.edit.where_to_edit.training import make_labels, train_mask_hypernetwork

__all__ = [
    "CutMixConfig",
    "EditConfig",
    "EditResult",
    "Edits",
    "HypernetworkConfig",
    "LabelConfig",
    "MaskHypernetwork",
    "Place",
    "Rows",
    "calibrate",
    "centred_log",
    "cutmix_pairs",
    "edit",
    "edit_many",
    "edit_sequence",
    "first_order_labels",
    "gradient_norms",
    "guarded",
    "magnitudes",
    "make_labels",
    "mask_labels",
    "predict_masks",
    "top_k",
    "train_mask_hypernetwork",
]
