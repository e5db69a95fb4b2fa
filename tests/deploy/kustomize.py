"""Renders the kustomizations of this repository where no kubectl is installed.

Supports what they use and refuses everything else: resources, images (newTag), and strategic-merge patches by path with
lists merged by name or mountPath and the directives `$patch: replace` and `$patch: delete`.
"""

import copy
import pathlib

import yaml

KNOWN_FIELDS = {"apiVersion", "kind", "resources", "images", "patches"}


def load_documents(path):
    with open(path, encoding="utf-8") as file:
        return [document for document in yaml.safe_load_all(file) if document]


def identity(resource):
    return resource["apiVersion"], resource["kind"], resource["metadata"]["name"]


def merge(target, patch):
    """Merges two values of the same place strategically. The result shares nothing with its inputs."""
    if isinstance(target, dict) and isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
        merged = copy.deepcopy(target)
        for key, value in patch.items():
            merged[key] = merge(merged[key], value) if key in merged else copy.deepcopy(value)
        return merged
    if isinstance(target, list) and isinstance(patch, list):
        return merge_list(target, patch)
    return copy.deepcopy(patch)


def merge_list(target, patch):
    if {"$patch": "replace"} in patch:
        return [copy.deepcopy(item) for item in patch if item != {"$patch": "replace"}]
    if not all(isinstance(item, dict) for item in target + patch):
        return copy.deepcopy(patch)
    key = "mountPath" if any("mountPath" in item for item in target) else "name"
    merged = {item[key]: copy.deepcopy(item) for item in target}
    for item in patch:
        if item.get("$patch") == "delete":
            del merged[item[key]]
        else:
            merged[item[key]] = merge(merged[item[key]], item) if item[key] in merged else copy.deepcopy(item)
    return list(merged.values())


def set_images(value, tags):
    if isinstance(value, dict):
        image = value.get("image")
        if isinstance(image, str) and image.split(":")[0] in tags:
            value["image"] = f"{image.split(':')[0]}:{tags[image.split(':')[0]]}"
        for child in value.values():
            set_images(child, tags)
    elif isinstance(value, list):
        for child in value:
            set_images(child, tags)


def render(folder):
    folder = pathlib.Path(folder)
    (kustomization,) = load_documents(folder / "kustomization.yaml")
    unknown = set(kustomization) - KNOWN_FIELDS
    if unknown:
        raise ValueError(f"{folder}/kustomization.yaml: {sorted(unknown)} not among {sorted(KNOWN_FIELDS)}")
    resources = {}
    for entry in kustomization["resources"]:
        path = folder / entry
        for resource in render(path) if path.is_dir() else load_documents(path):
            resources[identity(resource)] = resource
    for entry in kustomization.get("patches", []):
        for patch in load_documents(folder / entry["path"]):
            key = identity(patch)
            if patch.get("$patch") == "delete":
                del resources[key]
            else:
                resources[key] = merge(resources[key], patch)
    tags = {image["name"]: image["newTag"] for image in kustomization.get("images", [])}
    for resource in resources.values():
        set_images(resource, tags)
    return list(resources.values())
