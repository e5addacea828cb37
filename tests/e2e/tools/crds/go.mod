// The modules whose folders hold the definitions of custom resources. No Go code of theirs is built.
module tonnage/tests/e2e/tools/crds

go 1.25.6

require (
	github.com/kedacore/keda/v2 v2.18.0
	github.com/prometheus-operator/prometheus-operator v0.85.0
	sigs.k8s.io/lws v0.7.0
	sigs.k8s.io/secrets-store-csi-driver v1.5.5
)
