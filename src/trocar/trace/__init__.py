"""Floor 2: run a model and read, replace or scale what flows through it."""

from trocar.trace.intervene import intervene
from trocar.trace.interventions import Add, Intervention, Replace, Scale, pack, unpack
from trocar.trace.points import KINDS, Point, parse_point
from trocar.trace.prefix import Prefix, capture_prefix
from trocar.trace.record import Recording, record
from trocar.trace.sweep import SweepReport, sweep

__all__ = [
    "KINDS",
    "Add",
    "Intervention",
    "Point",
    "Prefix",
    "Recording",
    "Replace",
    "Scale",
    "SweepReport",
    "capture_prefix",
    "intervene",
    "pack",
    "parse_point",
    "record",
    "sweep",
    "unpack",
]
