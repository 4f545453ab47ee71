"""Conversion of pretrained models to a plan, and the uptraining that repairs them."""

from fusedkv_ext.conversion.coding import code_model, collect_stored, save_coded, simulated
from fusedkv_ext.conversion.convert import Conversion, calibration_windows, convert_model, save_conversion
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.conversion.uptraining import uptrain

__all__ = [
    "Conversion",
    "UptrainSettings",
    "calibration_windows",
    "code_model",
    "collect_stored",
    "convert_model",
    "save_coded",
    "save_conversion",
    "simulated",
    "uptrain",
]
