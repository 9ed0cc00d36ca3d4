"""What the libraries quantize with their defaults, through transformers: what `quantize` has to beat."""

import torch

from hfshrink.calibration import batches
from hfshrink.errors import require
from hfshrink.inputs import random_inputs
from hfshrink.quantization.graphs.exporting import quiet


def _samples(model, processor, rows):
    """Model inputs of each row."""
    found = [dict(batch) for batch in batches(rows, model, processor, batch_size=1)]
    return [{name: value for name, value in sample.items() if name != "labels"} for sample in found]


def _export(exporter, config, model, processor, folder):
    inputs = random_inputs(model, 2, 8, processor, pairs=True)
    flags = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with torch.no_grad(), quiet():
        exporter.export(model.eval(), {**inputs, **flags}, config).save_pretrained(folder)


def bare_onnx_dynamic(model, processor, rows, folder):
    """`onnxruntime.quantization.quantize_dynamic` with its defaults."""
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    config = OnnxConfig(dynamic=True, quantizer=OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig()))
    _export(OnnxExporter(), config, model, processor, folder)


def bare_onnx_static(model, processor, rows, folder):
    """`onnxruntime.quantization.quantize_static` with its defaults, calibrated on the same rows."""
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeStaticConfig(), calibration_dataset=_samples(model, processor, rows))
    _export(OnnxExporter(), OnnxConfig(dynamic=True, quantizer=quantizer), model, processor, folder)


def bare_openvino(model, processor, rows, folder):
    """`nncf.quantize` with its defaults, calibrated on the same rows."""
    require("openvino", extra="openvino")  # without its telemetry
    from transformers.exporters import NNCFOpenVINOQuantizer, OpenVINOConfig, OpenVINOExporter

    quantizer = NNCFOpenVINOQuantizer(calibration_dataset=_samples(model, processor, rows))
    _export(OpenVINOExporter(), OpenVINOConfig(dynamic=True, quantizer=quantizer), model, processor, folder)


BARE = {
    "bare-onnx-dynamic": bare_onnx_dynamic,
    "bare-onnx-static": bare_onnx_static,
    "bare-openvino": bare_openvino,
}
