"""What each TensorRT takes, as tables: operators by release, inputs that must be constant, types that it refuses.

Read out of the importer sources and the support documents of the releases. Restrictions are those of 8.2, with the
release that lifts them; None: none has. INT32 stands for INT64 too before 10, where the parser narrows it."""

EVER = None  # no release has lifted it

# 8.2, the Nano's: 130 operators
FIRST = """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu
Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool
GlobalLpPool GlobalMaxPool Greater GreaterOrEqual HardSigmoid Identity If ImageScaler InstanceNormalization IsNaN LRN
LSTM LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean Min Mul Neg
NonMaxSuppression Not Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN RandomUniform RandomUniformLike Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape
Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where"""
RELEASES = (
    ((8, 2), FIRST),
    ((8, 4), "HardSwish Shrink Xor"),
    ((8, 5), "GridSample MeanVarianceNormalization Mod NonZero OneHot RandomNormal RandomNormalLike RoiAlign Trilu"),
    ((8, 6), "GroupNormalization IsInf LayerNormalization"),
    ((10, 0), "CastLike Hardmax"),
    ((10, 1), "DeformConv Gelu Mish"),
    ((10, 4), "BlackmanWindow HammingWindow HannWindow"),
    ((10, 5), "STFT"),
    ((10, 14), "Attention RMSNormalization RotaryEmbedding Swish TensorScatter"),
)
SINCE = {name: release for release, names in RELEASES for name in names.split()}
LOCAL_FUNCTIONS = (10, 0)  # functions that the model itself brings

# what to do instead, for operators that nets really meet; the rest gets a general answer
INSTEAD = {
    "GridSample": "leave the sampling out of the engine, or build it of Floor, Clip, Cast, Gather and four weighted taps",
    "DeformConv": "use a plain Conv, or leave the sampling out of the engine",
    "OneHot": "compare with a constant row: Equal with 0..n-1, then Cast",
    "NonZero": "keep a mask and multiply by it, so that the number of values is fixed",
    "Compress": "keep a mask and multiply by it, so that the number of values is fixed",
    "Mod": "write it as x - y * floor(x / y), in floats",
    "Trilu": "multiply by a constant triangle",
    "RoiAlign": "crop outside the engine, or use fixed crops with Slice and Resize",
    "HardSwish": "export at opset 13, where it is x * HardSigmoid(x)",
    "LayerNormalization": "export at opset 13, where it is means, differences and a root",
    "GroupNormalization": "write it as means, differences and a root, or fold it into the convolution",
    "MeanVarianceNormalization": "write it as means, differences and a root",
    "RMSNormalization": "write it as the mean of squares and a root",
    "Gelu": "write it with Erf or Tanh (approximate='tanh')",
    "Mish": "write it as x * tanh(softplus(x))",
    "Swish": "write it as x * sigmoid(x)",
    "Hardmax": "take ArgMax outside the engine",
    "IsInf": "compare the absolute value with the largest float",
    "Xor": "write it as Not(Equal) of the two, cast to INT32",
    "CastLike": "use Cast with the type that is meant",
    "Shrink": "write it with Where",
    "RandomNormal": "give the noise as an input", "RandomNormalLike": "give the noise as an input",
    "MaxUnpool": "use ConvTranspose or Resize, and a MaxPool without indices",
    "Unique": "do it outside the engine", "Det": "do it outside the engine",
    "Attention": "write it as MatMul, Softmax, MatMul",
}

# (operators, input, its name, lifted in, cure)
MUST_BE_CONSTANT = (
    ("Conv ConvTranspose", 1, "weights", (8, 5), "store them as an initializer: export with constant folding"),
    ("Conv ConvTranspose", 2, "bias", EVER, "store it as an initializer (an Identity of one is none), or use Add"),
    ("InstanceNormalization", 1, "scale", (10, 0), "store it as an initializer, or multiply after the norm"),
    ("InstanceNormalization", 2, "bias", (10, 0), "store it as an initializer, or add it after the norm"),
    ("TopK", 1, "K", (8, 6), "give K as a number when the net is exported"),
    ("NonMaxSuppression", 2, "max_output_boxes_per_class", (8, 5), "give the limit as a number, or select boxes outside"),
    ("NonMaxSuppression", 3, "iou_threshold", (8, 5), "give the limit as a number, or select boxes outside the engine"),
    ("NonMaxSuppression", 4, "score_threshold", (8, 5), "give the limit as a number, or select boxes outside the engine"),
    ("CumSum", 1, "axis", EVER, "give the axis as a number when the net is exported"),
    ("Slice", 3, "axes", (10, 3), "slice along axes that are known when the net is exported"),
    ("Squeeze Unsqueeze", 1, "axes", EVER, "give the axes as numbers when the net is exported"),
    (" ".join(name for name in FIRST.split() if name.startswith("Reduce")), 1, "axes", EVER,
     "give the axes as numbers when the net is exported"),
    ("OneHot", 1, "depth", EVER, "give the number of classes when the net is exported"),
    ("Pad", 3, "axes", (10, 4), "pad with a full list of pads, one pair for each axis"),
    ("QuantizeLinear DequantizeLinear", 2, "zero point", EVER, "quantize symmetrically: zero point 0"),
)

_FLOATS_ONLY = """Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Log
LogSoftmax Reciprocal Round ScaledTanh Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu PRelu
Mish InstanceNormalization BatchNormalization Conv ConvTranspose Gemm MatMul GlobalAveragePool GlobalMaxPool LRN Resize
Upsample"""
_WITHOUT_BOOL = """Add Sub Mul Div Min Max Sum Mean Mod Equal Less Greater LessOrEqual GreaterOrEqual Pow Abs Neg Sign ArgMax
ArgMin TopK Relu CumSum Clip AveragePool MaxPool """ + " ".join(name for name in FIRST.split() if name.startswith("Reduce"))
_CAST = "cast to FP32 before, and back after if need be"
_BY_MASK = "cast to INT32 before, and compare with 0 after"

# (operators, inputs (None: all), types refused, lifted in, cure)
REFUSED_TYPES = (
    (_FLOATS_ONLY, None, "INT32 INT64 BOOL", EVER, _CAST),
    (_WITHOUT_BOOL, None, "BOOL", EVER, _BY_MASK),
    ("Pow", None, "INT32 INT64", (10, 14), _CAST),
    ("Relu", (0,), "INT32 INT64", (10, 0), "use Max with 0, or " + _CAST),
    ("ArgMax ArgMin TopK", (0,), "INT32 INT64", (8, 6), _CAST),
    ("Where", (1, 2), "BOOL", (8, 5), _BY_MASK),
    ("Gather GatherElements GatherND", (0,), "BOOL", (8, 5), _BY_MASK),
    ("And Or Xor Not", None, "FP32 FP16 BF16 INT32 INT64", EVER, "compare with 0 first, which gives BOOL"),
)

# ONNX's element types: number -> (name, first release that has it; None: none)
ELEMENTS = {
    1: ("FP32", (8, 2)), 2: ("UINT8", (8, 5)), 3: ("INT8", (8, 2)), 4: ("UINT16", None), 5: ("INT16", None),
    6: ("INT32", (8, 2)), 7: ("INT64", (8, 2)), 8: ("STRING", None), 9: ("BOOL", (8, 2)), 10: ("FP16", (8, 2)),
    11: ("FP64", (8, 2)), 12: ("UINT32", None), 13: ("UINT64", None), 14: ("COMPLEX64", None), 15: ("COMPLEX128", None),
    16: ("BF16", (10, 0)),
    17: ("FP8", (10, 0)), 18: ("FP8 E4M3FNUZ", None), 19: ("FP8 E5M2", None), 20: ("FP8 E5M2FNUZ", None),
    21: ("UINT4", None), 22: ("INT4", (10, 0)), 23: ("FP4", (10, 14)),
}
# UINT8 exists at the engine's edge only: the first node must convert it
UINT8_READERS = ("Cast", "CastLike", "Identity")
# "to the end" is written as the largest INT64; narrowed it means the same
CLAMPED_ALIKE = (("Slice", 1), ("Slice", 2))


def words(release):
    """(8, 2) -> '8.2'"""
    return "%d.%d" % release


def lifted(release, version):
    """Has a restriction that `release` lifted (None: none did) gone in TensorRT `version`?"""
    return release is not None and version >= release


def unknown(name, version):
    """Why TensorRT `version`, a tuple, has no importer for the operator: (rule, cure), or None when it has one."""
    since = SINCE.get(name)
    if since is not None and version >= since:
        return None
    cure = INSTEAD.get(name, "write it with operators that TensorRT %s has, or do it outside the engine" % words(version))
    if since is None:
        return "%s is in no TensorRT; it would be looked up as a plugin of that name" % name, cure
    return "%s is first in TensorRT %s, not yet in %s" % (name, words(since), words(version)), cure
