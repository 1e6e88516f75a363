"""The table of all stages: what a run's file may do, by the word after ``do``."""

from onnxslim_kd.stage import Stage
from onnxslim_kd.stages_graph import Export, InferPrune, Merge, Prune
from onnxslim_kd.stages_measure import Bench, Eval, Sensitivity
from onnxslim_kd.stages_train import Train

STAGES: dict[str, type[Stage]] = {
    "export": Export,
    "sensitivity": Sensitivity,
    "prune": Prune,
    "merge": Merge,
    "train": Train,
    "infer_prune": InferPrune,
    "bench": Bench,
    "eval": Eval,
}
