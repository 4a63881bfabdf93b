"""``croissant.json``: a dataset as Croissant 1.1 (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html)."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.experiment.spec import About
from stages.shard import COLUMNS, split_of

NAME = "croissant.json"

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileObject"),
            *("fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
            *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
            *("separator", "source", "subField", "transform"),
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
"""The context of the specification, and PROV."""

MEDIA = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}

TYPES = {pa.string(): "sc:Text", pa.int64(): "sc:Integer", pa.bool_(): "sc:Boolean"}
"""Type of a column → of a field; any other is a float."""

CITATION = (
    "@inproceedings{ilyas2019adversarial, title={Adversarial Examples Are Not Bugs, They Are Features}, "
    "author={Ilyas, Andrew and Santurkar, Shibani and Tsipras, Dimitris and Engstrom, Logan and Tran, Brandon and "
    "Madry, Aleksander}, booktitle={Advances in Neural Information Processing Systems}, year={2019}}"
)
"""The paper whose construction the datasets follow: https://arxiv.org/abs/1905.02175."""


def describe(manifest: Mapping[str, Any], recipe: Mapping[str, Any], about: About, text: str) -> dict[str, Any]:
    """The document.

    Args:
        manifest, recipe: of the dataset.
        about: what the experiment says of the images.
        text: a description.
    """
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": manifest["name"],
        "description": text,
        "version": version(manifest),
        "datePublished": manifest["made"],
        "license": about.license or "unknown",
        "citeAs": about.citation or CITATION,
        "creator": [{"@type": "sc:Organization", "name": name} for name in about.creators or ["unknown"]],
        "keywords": ["adversarial examples", "robustness", "image classification"],
        "isLiveDataset": False,
        **_provenance(manifest, recipe, about),
        "distribution": list(_files(manifest)),
        "recordSet": [_classes(manifest), _samples(manifest), _images(manifest)],
    }


def version(manifest: Mapping[str, Any]) -> str:
    """The version as MAJOR.MINOR.PATCH+BUILD, which Croissant asks for: the format's number, then the digest."""
    return f"{manifest['format']}.0.0+{manifest['version']}"


def _provenance(manifest: Mapping[str, Any], recipe: Mapping[str, Any], about: About) -> dict[str, Any]:
    parents = [_entity(role, parent) for role, parent in manifest["parents"].items()]
    source = [{"@type": "prov:Entity", "name": about.source or "unknown source"}]
    agent = f"notbugs {manifest['environment'].get('notbugs', '')}".strip()
    return {
        "prov:wasDerivedFrom": parents or source,
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": f"{recipe['stage']}, recipe {manifest['version']}",
            "prov:endedAtTime": manifest["made"],
            "prov:wasAssociatedWith": {"@type": "prov:SoftwareAgent", "name": agent},
        },
    }


def _entity(role: str, parent: Mapping[str, str]) -> dict[str, Any]:
    identity = f"urn:notbugs:{parent['node'].replace('/', ':')}:{parent['version']}"
    return {"@type": "prov:Entity", "@id": identity, "name": f"{role}: {parent['node']}", "sha256": parent["content"]}


def _files(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every shard and the table, then the members of the shards by kind."""
    kinds = {"tar": "application/x-tar", "parquet": "application/x-parquet"}
    shards = []
    for file in manifest["files"]:
        name, kind = file["name"], file["name"].rpartition(".")[2]
        if kind in kinds:
            shards += [{"@id": name}] if kind == "tar" else []
            yield {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": name,
                "contentSize": f"{file['bytes']} B",
                "encodingFormat": kinds[kind],
                "sha256": file["sha256"],
            }
    media = {**MEDIA, "cls": "text/plain", "json": "application/json"}
    for suffix in manifest["members"]:
        yield {
            "@type": "cr:FileSet",
            "@id": f"{suffix}-files",
            "name": f"{suffix}-files",
            "containedIn": shards,
            "encodingFormat": media[suffix],
            "includes": f"*.{suffix}",
        }


def _classes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    field = {"@type": "cr:Field", "dataType": "sc:Integer", "@id": "classes/label", "name": "classes/label"}
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/label"},
        "field": [field, {**field, "dataType": "sc:Text", "@id": "classes/name", "name": "classes/name"}],
        "data": [{"classes/label": i, "classes/name": name} for i, name in enumerate(manifest["classes"])],
    }


def _samples(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A record per row of ``samples.parquet``."""
    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "description": f"A record per sample, of the splits {', '.join(sorted({*map(split_of, manifest['shards'])}))}.",
        "key": {"@id": "samples/key"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"samples/{name}",
                "name": f"samples/{name}",
                "dataType": TYPES.get(kind, "sc:Float"),
                "source": {"fileObject": {"@id": "samples.parquet"}, "extract": {"column": name}},
                **({"references": {"field": {"@id": "classes/label"}}} if name == "label" else {}),
            }
            for name, kind in COLUMNS.items()
        ],
    }


def _images(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A record per image file: the image, and the key of its sample, which is the stem of the file's name."""
    files = {"fileSet": {"@id": f"{manifest['members'][0]}-files"}}
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "key": {"@id": "images/key"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": "images/key",
                "name": "images/key",
                "dataType": "sc:Text",
                "source": {
                    **files,
                    "extract": {"fileProperty": "filename"},
                    "transform": {"regex": r"^(?:.*/)?([^/.]+)\.[^/]*$"},
                },
            },
            {
                "@type": "cr:Field",
                "@id": "images/image",
                "name": "images/image",
                "dataType": "sc:ImageObject",
                "source": {**files, "extract": {"fileProperty": "content"}},
            },
        ],
    }
