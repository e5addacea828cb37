"""Stand-ins for the azure-native and kubernetes providers, over Pulumi's own provider protocol."""
