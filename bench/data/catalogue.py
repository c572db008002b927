"""The data sets: files, checksums, addresses, licences, citations."""

from __future__ import annotations

from gradiometer.bench.data.entry import Binarization, Entry, File, Source


def _mirrored(folder: str, bases: tuple[str, ...], digests: dict[str, str]) -> tuple[File, ...]:
    return tuple(
        File(f"{folder}/{name}", f"sha256:{digest}", tuple(base + name for base in bases))
        for name, digest in digests.items()
    )


_GREY: tuple[Binarization, ...] = ("dynamic", "static", "none")

_AMAT = {
    "train": "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "sha256:1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
_AMAT_BASES = (
    "https://raw.githubusercontent.com/riannevdberg/sylvester-flows/32dde9b7d696fee94f946a338182e542779eecfe/data/MNIST_static/",
    "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
)

_DIGITS = Entry(
    name="digits",
    summary="handwritten digits, 17 grey levels; nothing to download",
    shape=(8, 8),
    sizes=(1297, 250, 250),
    modes=_GREY,
    sources=(
        Source(
            "digits",
            (
                File(
                    "datasets/data/digits.csv.gz",
                    "sha256:6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8",
                    unpacked=True,
                    package="sklearn",
                ),
            ),
        ),
    ),
    licence="CC BY 4.0",
    citation="E. Alpaydin, C. Kaynak. Optical recognition of handwritten digits. UCI Machine Learning Repository, "
    "1998.",
)

_MNIST = Entry(
    name="mnist",
    summary="handwritten digits, grey; the last 10,000 training images validate",
    shape=(28, 28),
    sizes=(50_000, 10_000, 10_000),
    modes=_GREY,
    sources=(
        Source(
            "idx",
            _mirrored(
                "mnist",
                (
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                    "https://storage.googleapis.com/cvdf-datasets/mnist/",
                ),
                {
                    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                },
            ),
        ),
    ),
    licence="none stated by the distributor; CC BY-SA 3.0 according to others",
    citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document recognition. "
    "Proceedings of the IEEE 86(11):2278-2324, 1998.",
)

_FASHION_MNIST = Entry(
    name="fashion-mnist",
    summary="articles of clothing, grey; the last 10,000 training images validate",
    shape=(28, 28),
    sizes=(50_000, 10_000, 10_000),
    modes=_GREY,
    sources=(
        Source(
            "idx",
            _mirrored(
                "fashion_mnist",
                (
                    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                ),
                {
                    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                },
            ),
        ),
    ),
    licence="MIT, Copyright 2017 Zalando SE",
    citation="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking machine learning "
    "algorithms. arXiv:1708.07747, 2017.",
)

_BINARIZED_MNIST = Entry(
    name="binarized-mnist",
    summary="one fixed Bernoulli sample of each MNIST image, with a split of its own",
    shape=(28, 28),
    sizes=(50_000, 10_000, 10_000),
    modes=("static",),
    sources=(
        Source(
            "packed",
            (
                File(
                    "binarized_mnist/binarized_mnist_packed.npz",
                    "sha256:df14a884cb4aa7ac6692463fb31798a687c4e762c73c23a8ae3114fbec4e6093",
                ),
            ),
            same_as=tuple(_AMAT.values()),
        ),
        Source(
            "amat",
            tuple(
                File(f"binarized_mnist/binarized_mnist_{split}.amat.gz", digest, unpacked=True)
                for split, digest in _AMAT.items()
            ),
        ),
        Source(
            "amat",
            tuple(
                File(
                    f"binarized_mnist/binarized_mnist_{split}.amat",
                    digest,
                    tuple(f"{base}binarized_mnist_{split}.amat" for base in _AMAT_BASES),
                )
                for split, digest in _AMAT.items()
            ),
        ),
    ),
    licence="none stated by the distributor; derived from MNIST",
    citation="R. Salakhutdinov, I. Murray. On the quantitative analysis of deep belief networks. ICML 2008; "
    "distributed by H. Larochelle, I. Murray. The neural autoregressive distribution estimator. AISTATS 2011.",
)

_DRAWINGS = (
    "B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum. Human-level concept learning through probabilistic program "
    "induction. Science 350(6266):1332-1338, 2015."
)

_OMNIGLOT_BURDA = Entry(
    name="omniglot-burda",
    summary="characters of 50 alphabets: chardata.mat, the 28x28 version of the IWAE paper",
    shape=(28, 28),
    sizes=(23_000, 1_345, 8_070),
    modes=_GREY,
    sources=(
        Source(
            "chardata",
            (
                File(
                    "omniglot/chardata.mat",
                    "git-blob:016a3536ffe5e1d38e42563a18d7a78bfaf643ec",
                    (
                        "https://raw.githubusercontent.com/yburda/iwae/78a6075484bd7dd6f47a4bb9880d2295bc7a5220/datasets/OMNIGLOT/chardata.mat",
                    ),
                ),
            ),
        ),
    ),
    licence="none stated by the distributor; derived from Omniglot (MIT, Copyright 2015 Brenden Lake)",
    citation="Y. Burda, R. Grosse, R. Salakhutdinov. Importance weighted autoencoders. ICLR 2016. arXiv:1509.00519. "
    + _DRAWINGS,
)

_OMNIGLOT_AREA28 = Entry(
    name="omniglot-area28",
    summary="area average of the 105x105 Omniglot drawings, a stand-in: NOT comparable with published Omniglot results",
    shape=(28, 28),
    sizes=(23_000, 1_345, 8_115),
    modes=_GREY,
    sources=(
        Source(
            "drawings",
            (
                File(
                    "omniglot/images_background.npz",
                    "sha256:8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199",
                ),
                File(
                    "omniglot/images_evaluation.npz",
                    "sha256:0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276",
                ),
            ),
        ),
    ),
    licence="MIT, Copyright 2015 Brenden Lake",
    citation=_DRAWINGS,
)

ENTRIES = {
    entry.name: entry
    for entry in (_DIGITS, _MNIST, _FASHION_MNIST, _BINARIZED_MNIST, _OMNIGLOT_BURDA, _OMNIGLOT_AREA28)
}

# A name for whichever of several data sets is at hand, the preferred first.
EITHER = {"omniglot": ("omniglot-burda", "omniglot-area28")}
