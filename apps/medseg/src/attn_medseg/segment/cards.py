"""The data sets of segmentation. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from attn_shared.app import DataCard, listed_files

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
"""Suffixes of files with millimetres, of axes x, y, z."""
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
"""Suffixes of pictures, of axes height and width."""
FILE_FORMATS = (
    "To segment: a folder with images/ and masks/ (or labels/) whose files have the same names, in one folder each or "
    "in train/, val/ and test/; a folder with a dataset.json of nnU-Net or of the Medical Segmentation Decathlon; the "
    "folders of ACDC (patient001/patient001_frame01_gt.nii.gz), Synapse as TransUNet prepares it, ISIC 2016 to 2018, "
    "PH2 and DRIVE as they are published. Volumes are NIfTI, NRRD, MetaImage or folders of a DICOM series; pictures "
    "are PNG, JPEG, TIFF, BMP or GIF."
)
FILE_SUFFIXES = (*VOLUMES, *PICTURES, ".json")

HIPPOCAMPUS, ACDC, PH2 = "hippocampus", "acdc_96.npz", "ph2_128x96.npz"
"""Paths under the folder of the data sets."""

_CHECKSUMS = Path(__file__).with_name("checksums.txt")
_DRAWN = "by patient: 20 % drawn for test, 10 % of the rest for validation; --data_args.split kfold for folds"

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic",
            title="Synthetic volumes: balls of three brightnesses in noise (MONAI's create_test_image_3d)",
            task="segment balls in volumes",
            licence="made by this application, with MONAI (Apache-2.0)",
            source="generated",
            size="60 volumes of 32 x 32 x 32",
            split="40 train, 8 validation, 12 test",
            citation="none",
            embedded=True,
            synthetic=True,
            kind="segment",
        ),
        DataCard(
            name="synthetic_2d",
            title="Synthetic pictures: discs of three brightnesses in noise (MONAI's create_test_image_2d)",
            task="segment discs in pictures",
            licence="made by this application, with MONAI (Apache-2.0)",
            source="generated",
            size="120 pictures of 64 x 64",
            split="80 train, 16 validation, 24 test",
            citation="none",
            embedded=True,
            synthetic=True,
            kind="segment",
        ),
        DataCard(
            name="hippocampus",
            title="Medical Segmentation Decathlon, task 4: hippocampus in MRI, 3-D",
            task="segment the anterior and the posterior hippocampus",
            licence="CC BY-SA 4.0",
            source="github.com/udacity/nd320-c3-3d-imaging-starter, data/TrainingSet, unmodified",
            size="260 volumes with labels, 1 mm, median 35 x 50 x 36 voxels; 19 MB",
            split=_DRAWN,
            citation="M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022; A. L. "
            "Simpson et al., arXiv:1902.09063",
            subdir="medseg",
            files=listed_files(_CHECKSUMS, HIPPOCAMPUS + "/"),
            manual="take images and labels of data/TrainingSet in github.com/udacity/nd320-c3-3d-imaging-starter to "
            "$ATTN_DATA/medseg/hippocampus",
            facts={
                "left out": "volumes 010 and 281 have a label but no image there, 118 an image but no label",
                "trap": "the largest intensity of a volume lies between about 100 and over a million: normalise each",
            },
            kind="segment",
        ),
        DataCard(
            name="acdc",
            title="ACDC: cine MRI of the heart, slices of 96 x 96, with scribbles",
            task="segment the right ventricle, the myocardium and the left ventricle",
            licence="non-commercial research (CC BY-NC-SA 4.0 by the challenge); scribbles by their authors",
            source="github.com/HiLab-git/WSL4MIS, data/ACDC: the centre 62 % of each slice resized to 96 x 96, min to "
            "max as uint8",
            size="1,902 slices: 200 volumes (end of diastole and of systole) of 100 patients; 16 MB",
            split=_DRAWN,
            citation="O. Bernard et al., IEEE TMI 2018 (ACDC); G. Valvano et al., IEEE TMI 2021 (scribbles)",
            subdir="medseg",
            files=listed_files(_CHECKSUMS, ACDC),
            manual="read the slices of data/ACDC in github.com/HiLab-git/WSL4MIS, keep the centre 62 % of each, resize "
            "to 96 x 96 and save image, label, scribble, patient and name to $ATTN_DATA/medseg/acdc_96.npz",
            facts={
                "spacing": "lost: distances are in pixels of 96 x 96, volumes in voxels, and neither compares with "
                "published ones",
                "scribbles": "about 1 % of the voxels are drawn (--data_args.supervision scribble)",
            },
            kind="segment",
        ),
        DataCard(
            name="ph2",
            title="PH2: dermoscopy, 128 x 96",
            task="segment skin lesions",
            licence="research and education only",
            source="github.com/Furqan3/Melanoma-Detection, PH2Dataset, resized to 128 x 96",
            size="199 of the 200 pictures; 6 MB",
            split="20 % of the pictures drawn for test, 10 % of the rest for validation; patients are not known",
            citation="T. Mendonca et al., PH2: a dermoscopic image database for research and benchmarking, EMBC 2013",
            subdir="medseg",
            files=listed_files(_CHECKSUMS, PH2),
            manual="resize the pictures and masks of PH2Dataset in github.com/Furqan3/Melanoma-Detection to 128 x 96 "
            "and save image, mask and name to $ATTN_DATA/medseg/ph2_128x96.npz",
            kind="segment",
        ),
    )
}
