//! The bill of materials: CycloneDX 1.5, as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Result;
use crate::linked::{Crate, Id, PRODUCT};

/// The bill of materials. No `serialNumber` and no `timestamp`, which would differ from build to build.
pub(crate) fn json(linked: &BTreeMap<Id, Crate>, target: &str) -> Result<String> {
    let product = linked.keys().find(|id| id.0 == PRODUCT);
    let product = product.ok_or("the shim itself is not there")?;
    let components: Vec<Value> = linked
        .iter()
        .filter(|(id, _)| *id != product)
        .map(|(id, one)| component(id, one))
        .collect();
    let dependencies: Vec<Value> = linked
        .iter()
        .map(|(id, one)| {
            let uses: Vec<String> = one.uses.iter().map(purl).collect();
            json!({ "ref": purl(id), "dependsOn": uses })
        })
        .collect();
    let bom = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": purl(product),
                "name": "containerd-shim-pause-v2",
                "version": product.1,
                "licenses": [{ "expression": linked[product].license }],
                "properties": [{ "name": "target", "value": target }],
            },
        },
        "components": components,
        "dependencies": dependencies,
    });
    Ok(format!("{}\n", serde_json::to_string_pretty(&bom)?))
}

fn component(id: &Id, one: &Crate) -> Value {
    let mut component = json!({
        "type": "library",
        "bom-ref": purl(id),
        "name": id.0,
        "version": id.1,
        "licenses": [{ "expression": one.license }],
    });
    // A purl leads to the registry, where the project's own crates are not.
    if one.source.is_some() {
        component["purl"] = purl(id).into();
    }
    if let Some(checksum) = &one.checksum {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    if let Some(repository) = &one.repository {
        component["externalReferences"] = json!([{ "type": "vcs", "url": repository }]);
    }
    component
}

/// The package URL of a crate. A `+` in a version has a meaning in URLs.
fn purl((name, version): &Id) -> String {
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_in_a_purl_is_escaped() {
        let id = ("toml".to_owned(), "1.2.1+spec-1.1.0".to_owned());
        assert_eq!(purl(&id), "pkg:cargo/toml@1.2.1%2Bspec-1.1.0");
    }
}
