"""The table of all stages: what a run's file may do, by the word after ``do``."""

from onnxslim_kd.stage import Stage
from onnxslim_kd.stages_graph import Export, InferPrune, Merge, Prune
from onnxslim_kd.stages_measure import Bench, Eval, Search, Sensitivity
from onnxslim_kd.stages_train import Calibrate, Train

STAGES: dict[str, type[Stage]] = {
    "export": Export,
    "sensitivity": Sensitivity,
    "search": Search,
    "prune": Prune,
    "merge": Merge,
    "train": Train,
    "calibrate": Calibrate,
    "infer_prune": InferPrune,
    "bench": Bench,
    "eval": Eval,
}
